"""Validation losses of our own runs, to compare a new run of the same recipe with.

They are in curves.json, as {name: Curve}. A run is compared with a curve of the same recipe, flags
and text. Its losses still differ a little, because of its seed and the machine's rounding.
"""

import json
import typing
from pathlib import Path

from training.recipes import RECIPES

CURVES = Path(__file__).with_name("curves.json")
SPREAD = 0.02  # nats per token; another seed or machine usually changes a loss by less
MAKES_NO_DIFFERENCE = {"data", "out", "recipe", "seed", "checkpoint_every", "saved_dtype"}
MAKES_NO_DIFFERENCE |= {"dtype", "fsdp", "eval_every"}


class Curve(typing.NamedTuple):
    """flags: those that override the recipe. text: the fingerprint of the training text.
    validation: [(step, nats per token), ...]."""

    recipe: str
    flags: dict
    text: str
    validation: list


def read_curves():  # -> {name: Curve}
    curves = json.loads(CURVES.read_text("utf-8"))
    return {name: Curve(**fields) for name, fields in curves.items()}


def expected_losses(flags, text):  # -> {step: nats per token}; empty if there is no such curve
    """flags: of a run. text: the fingerprint of its training text."""

    def telling(values):
        return {name: x for name, x in values.items() if name not in MAKES_NO_DIFFERENCE}

    for curve in read_curves().values():
        wanted = telling(RECIPES[curve.recipe] | curve.flags)
        if text == curve.text and wanted == {name: flags.get(name) for name in wanted}:
            return dict(curve.validation)
    return {}


def compare(loss, expected):  # -> a line for people
    """
    >>> compare(1.612, 1.607)
    'the validation loss is as expected: 1.6120, and 1.6070 when we ran this recipe'
    >>> compare(1.75, 1.607)
    'the validation loss is 0.143 higher than expected: 1.7500, and 1.6070 when we ran this recipe'
    """
    difference = loss - expected
    verdict = "as expected"
    if abs(difference) > SPREAD:
        verdict = f"{abs(difference):.3f} {'higher' if difference > 0 else 'lower'} than expected"
    return (
        f"the validation loss is {verdict}: {loss:.4f}, and {expected:.4f} when we ran this recipe"
    )
