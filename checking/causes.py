"""Compares somebody's tensors with ours, and finds the cause of the first difference.

No cause is guessed. The tensor is computed again with each common mistake, in float64 and in the
precision of the comparison. A mistake is the cause if it gives their tensor, up to rounding.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from checking import layouts, mistakes, names
from checking.precision import SHAKEN, UNITS, Distance, Twin, allowed, distance
from checking.recording import ADAMW, backward, casts, forward, n_terms, step
from model_files.weights import leaves, nest
from plumbing.cli import notice

CERTAIN = 1e-3  # if less of the difference is left, no other mistake needs to be tried
DROP_RATES = (0.1, 0.2, 0.5, 0.05)


class Difference(NamedTuple):
    """One of their tensors, compared with its float64 twin."""

    entry: layouts.Entry
    theirs: Distance  # of their tensor
    ours: Distance  # of gpt2.py's, in the same precision
    limit: Distance  # the most that rounding explains

    @property
    def agrees(self):
        return self.theirs.within(self.limit)


class Cause(NamedTuple):
    """A mistake that gives their tensor."""

    text: str
    n_same: int  # how many of their tensors it gives, from the first that differs
    n_after: int  # the number of tensors from there on
    is_close: bool = False  # the closest mistake, but not equal up to rounding
    share: float = 0.0  # how much of the difference is left
    evidence: str = "Recomputed with this mistake, it agrees"


class Verdict(NamedTuple):
    """The result of a comparison."""

    differences: list  # one Difference per tensor, in the order of our names
    cause: Cause | None
    case: object

    @property
    def first(self):
        return next((d for d in self.differences if not d.agrees), None)


def compute(case, precision, kinds):
    """Returns all tensors of these kinds ("params.", "", "grad.", "step.") as {name: array}."""
    arrays = {f"params.{name}": x for name, x in leaves(case.params[precision]).items()}
    if "" in kinds:
        arrays |= forward(case, precision)
    if {"grad.", "step."} & set(kinds):
        gradients = backward(case, precision)
        arrays |= gradients
        if "step." in kinds:
            arrays |= step(case, precision, gradients)
    return arrays


def twins(case, kinds):  # -> {name: Twin}
    return pair(case, lambda precision: compute(case, precision, kinds))


def pair(case, run):  # run(precision) -> {name: array};  -> {name: Twin}
    exact, rounded, shaken = (run(p) for p in ("float64", case.dtype, SHAKEN + case.dtype))
    return {name: Twin(x, rounded[name], shaken[name]) for name, x in exact.items()}


def compare(arrays, case, source="theirs"):  # {their name: array} -> Verdict
    """Raises ValueError for unknown names, for shapes of no known layout, and for NaN."""
    entries = layouts.read_entries(arrays, case, source)
    if not entries:
        raise ValueError(f"{source}: no tensor to compare; --names lists the accepted names")
    kinds = {names.split_kind(entry.name)[0] for entry in entries}
    ours = twins(case, kinds)
    found = [measure(entry, ours, case) for entry in entries]
    check_finite(found, ours, case, source)
    after = list(itertools.dropwhile(lambda d: d.agrees, found))
    cause = find_cause(after, ours, case) if after else None
    return Verdict(found, cause, case)


def measure(entry, ours, case):  # -> Difference
    twin = select(entry, ours[entry.name])
    if entry.name.endswith("attn.scores") and not entry.name.startswith("grad."):
        entry = layouts.fill_hidden(entry, twin.exact)
    slack, limit = tolerance(entry.name, twin, ours, case)
    theirs = layouts.closest(entry, lambda x: distance(x, twin.exact, slack))
    return Difference(entry, theirs, distance(twin.rounded, twin.exact), limit)


def select(entry, twin):  # the part of a twin that an entry is compared with
    return Twin(*(comparable(entry, x) for x in twin))


def comparable(entry, x):
    return layouts.comparable(entry.name, entry.select(x))


def tolerance(name, twin, ours, case):  # -> the slack of each number, the limit for the tensor
    limit = allowed(twin, case.dtype, n_terms(case))
    if name == "loss":  # ours can be exact by chance, but a mean is no worse than its losses
        rms = allowed(ours["losses"], case.dtype, n_terms(case)).rms
        return 0, Distance(rms, rms, ())
    if not name.startswith("step."):
        return 0, limit
    # Adam divides a gradient by its size. If the gradient is as small as its own rounding, no digit
    # of the step is certain, not even the sign.
    gradient = ours[name.replace("step.", "grad.", 1)]
    wrong = allowed(gradient, case.dtype, n_terms(case)).largest
    unsure = np.minimum(2, 2 * wrong / (np.abs(gradient.exact) + ADAMW["adam_eps"]))
    unit = 2 * UNITS[case.dtype]
    size = np.abs(twin.exact)
    limit = Distance(
        unit * math.sqrt(np.square(size).mean()) + 1e-4 * ADAMW["learning_rate"],
        2 * unit * size.max() + 1e-3 * ADAMW["learning_rate"],
        (),
    )
    return ADAMW["learning_rate"] * unsure, limit


def check_finite(found, ours, case, source):
    """Raises ValueError, with the cause if it is found, if theirs has a NaN and ours has none."""
    for i, d in enumerate(found):
        exact = comparable(d.entry, ours[d.entry.name].exact)
        arrays = d.entry.arrays
        if d.entry.name.endswith("attn.masked"):  # here -inf is the mask
            arrays = [np.where(np.isneginf(x), 0, x) for x in arrays]
        wrong = [~np.isfinite(x) & np.isfinite(exact) for x in arrays]
        where = min(wrong, key=np.count_nonzero)
        if not where.any():
            continue
        earlier = next((other for other in found[:i] if not other.agrees), None)
        before = f"the {i} tensors before it agree"
        if earlier:
            before = f"{earlier.entry.theirs}, before it, already differs"
        cause = find_cause(found[i:], ours, case)
        same = f"; this mistake gives the same: {cause.text}" if cause else ""
        raise ValueError(
            f"{source}: {d.entry.theirs} is the first tensor with NaN or infinity: "
            f"{np.count_nonzero(where)} of {where.size} numbers, the first at "
            f"{np.argwhere(where)[0].tolist()}; {before}{same}"
        )


# --- Causes ---------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A mistake, and how to compute tensors with it."""

    text: str
    compute: object  # (precision, the last name that is needed, or None) -> {name: array}


def find_cause(after, ours, case):  # the first that differs and all after it -> Cause or None
    first = after[0]
    name = first.entry.name
    kind = names.split_kind(name)[0]
    candidates = {"": forward_candidates, "grad.": gradient_candidates, "step.": step_candidates}
    causes = []
    if kind in candidates:
        causes = try_all(candidates[kind](case, ours, name), after, ours, case)
    if kind == "" and not any(c.n_same == c.n_after and not c.is_close for c in causes):
        notice("no mistake in every block gives all tensors; trying each block by itself")
        causes += try_all(block_candidates(case, name), after, ours, case)
    if kind == "grad." and all(cause.is_close for cause in causes):
        causes += by_slopes(first, ours, case)
    exact = [cause for cause in causes if not cause.is_close]
    if exact:
        return max(exact, key=lambda cause: (cause.n_same, -cause.share))
    for other in (find_dropout, find_other_head):
        cause = other(first, after, ours, case)
        if cause:
            return cause
    precision = find_precision(first, after, ours, case)
    if precision and all(precision.n_same >= cause.n_same for cause in causes):
        return precision
    return min(causes, key=lambda cause: cause.share, default=None)


def try_all(candidates, after, ours, case):  # -> [Cause]
    first = after[0]
    entry = first.entry
    name = entry.name
    twin = select(entry, ours[name])
    slack, _ = tolerance(name, twin, ours, case)
    before = first.theirs.rms
    causes = []
    for candidate in candidates:
        with np.errstate(all="ignore"):
            exact = candidate.compute("float64", name).get(name)
        if exact is None:
            continue
        exact = comparable(entry, exact)
        rest = layouts.closest(entry, lambda x, exact=exact: distance(x, exact, slack)).rms
        if not rest < before / 2 or distance(exact, twin.exact).rms == 0:
            continue
        share = rest / before if math.isfinite(before) else 0.0
        with np.errstate(all="ignore"):
            wrong = pair(case, lambda precision, c=candidate: c.compute(precision, None))
        same = [gives(wrong, d.entry, ours, case) for d in after if d.entry.name in wrong]
        causes.append(Cause(candidate.text, sum(same), len(same), not same[0], share))
        if all(same) and share < CERTAIN:
            break
    return causes


def gives(wrong, entry, ours, case):  # does a mistake's Twin of this tensor make theirs?
    twin = select(entry, wrong[entry.name])
    slack, limit = tolerance(entry.name, twin, ours | wrong, case)
    return layouts.closest(entry, lambda x: distance(x, twin.exact, slack)).within(limit)


def forward_candidates(case, ours, name):
    for mistake in mistakes.FORWARD:
        yield forward_candidate(case, mistake)


def block_candidates(case, name):
    """Yields the same mistakes in one block: that of the tensor or, after the last block, any."""
    parts = name.split(".")
    blocks = [int(parts[1])] if parts[0] == "blocks" else range(case.sizes()["n_layer"])
    local = ("gelu", "softmax", "layer_norm", "linear", "mha", "attention_weights",
             "transformer_block")  # fmt: skip
    if case.sizes()["n_layer"] > 1:
        for block in blocks:
            for mistake in mistakes.FORWARD:
                if mistake.function in local and mistake.layer != "ln_f":
                    yield forward_candidate(case, mistake, block)


def forward_candidate(case, mistake, block=None):
    def compute(precision, until):
        return forward(case, precision, mistake, block, until)

    where = "" if block is None else f" (only in block {block})"
    return Candidate(mistake.cause + where, compute)


def gradient_candidates(case, ours, name):
    sizes = case.sizes()
    n_batch, n_seq = sizes["n_batch"], sizes["n_seq"]
    gradients = {name: twin for name, twin in ours.items() if name.startswith("grad.")}

    def changed(change):
        def compute(precision, until):
            part = part_of(precision)
            return {name: change(name, twin[part], part) for name, twin in gradients.items()}

        return compute

    scales = {
        f"the gradients are not averaged; they are a sum over all {n_batch * n_seq} tokens":
            n_batch * n_seq,
        "the gradients are not averaged over the sequences; they are a sum over n_batch": n_batch,
        "the gradients are the mean over the wrong axis; they are a sum over positions": n_seq,
        "the gradients are divided by n_batch twice": 1 / n_batch,
        "the gradients are twice as large; perhaps those of another pass were not cleared": 2,
    }  # fmt: skip
    for text, scale in scales.items():
        if scale != 1:
            yield Candidate(text, changed(lambda name, x, part, scale=scale: scale * x))
    for text, is_head in (
        ("wte's gradient lacks the embedding's share, which belongs to the inputs' rows", True),
        ("wte's gradient lacks the head's share; tie the head to wte", False),
    ):
        yield Candidate(text, changed(tied_share(case, ours, is_head)))
    root = math.sqrt(sizes["d_head"])

    def before_scaling(name, x, part):
        return x / root if name.endswith("attn.scores") else x

    yield Candidate(
        "the gradient of the scores is taken before they are divided by the square root of d_head; "
        "here the scores are the input of softmax",
        changed(before_scaling),
    )
    for mistake in mistakes.BACKWARD:
        yield Candidate(
            mistake.cause, lambda precision, until, m=mistake: backward(case, precision, m)
        )


def part_of(precision):  # -> the index in a Twin
    return 0 if precision == "float64" else 2 if precision.startswith(SHAKEN) else 1


def tied_share(case, ours, is_head):
    """Splits wte's gradient: d_logits^T x comes from the head, the rest from the embedding."""
    d_logits = ours["grad.logits"]
    streams = pair(case, lambda precision: forward(case, precision, until="ln_f"))

    def change(name, x, part):
        if name != "grad.wte":
            return x
        of_head = np.einsum("btv,bte->ve", d_logits[part], streams["ln_f"][part])
        return of_head if is_head else x - of_head

    return change


def step_candidates(case, ours, name):
    gradients = {name: twin for name, twin in ours.items() if name.startswith("grad.")}
    for mistake in mistakes.STEP:

        def compute(precision, until, mistake=mistake):
            part = part_of(precision)
            return step(case, precision, {n: twin[part] for n, twin in gradients.items()}, mistake)

        yield Candidate(mistake.cause, compute)


def by_slopes(first, ours, case):
    """Finds a mistake of the forward pass that explains their gradient, without computing one.

    A gradient says how steep the loss is in every direction. If their gradient comes from a
    mistake, the loss with that mistake must be as steep as their gradient says, which can be
    measured.
    """
    name = first.entry.name.removeprefix("grad.")
    arrays = leaves(case.params["float64"])
    if name not in arrays:
        return []
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (3, *arrays[name].shape))
    exact = ours[first.entry.name].exact
    for theirs in first.entry.arrays:
        gap = theirs - exact
        directions = [gap, *(gap * signs)]
        for mistake in mistakes.FORWARD:
            if all(fits(case, mistake, name, theirs, gap, d) for d in directions):
                evidence = "With it, the loss is as steep as this gradient says"
                return [Cause(mistake.cause, 1, 1, evidence=evidence)]
    return []


def fits(case, mistake, name, theirs, gap, direction):
    """Returns whether the loss rises along the direction as theirs says, within 2% of the gap."""
    length = np.linalg.norm(direction)
    direction = direction / length
    slope = measured_slope(case, mistake, name, direction)
    claimed = float((theirs * direction).sum())
    return abs(slope - claimed) < 0.02 * np.linalg.norm(gap)


def measured_slope(case, mistake, name, direction):
    arrays = leaves(case.params["float64"])
    size = 1e-5 * max(1.0, float(np.linalg.norm(arrays[name])))
    losses = []
    for sign in (1, -1):
        moved = nest(arrays | {name: arrays[name] + sign * size * direction})
        with np.errstate(all="ignore"):
            losses.append(float(forward(case, "float64", mistake, params=moved)["loss"]))
    return (losses[0] - losses[1]) / (2 * size)


# --- Causes that no single function explains ------------------------------------------------------


def find_dropout(first, after, ours, case):
    """Dropout sets random numbers to zero, and makes the others larger to compensate."""
    exact = first.entry.select(ours[first.entry.name].exact)
    for x in first.entry.arrays:
        dropped = (x == 0) & (exact != 0)
        share = dropped.mean()
        for rate in DROP_RATES:
            if not rate / 3 < share < 3 * rate:
                continue
            scaled = np.where(dropped, 0, exact / (1 - rate))
            if distance(x, scaled).rms < 0.02 * first.theirs.rms:
                evidence = (
                    f"{share:.0%} of the numbers are 0, the others are {1 / (1 - rate):.2f} x ours"
                )
                text = f"dropout is on, at a rate of {rate}; compare in evaluation mode"
                return Cause(text, 1, 1, evidence=evidence)
    return None


def find_other_head(first, after, ours, case):
    """Finds out whether the logits are the right stream times a matrix other than wte.

    This takes more tokens than n_embd, because no matrix would then give arbitrary logits.
    """
    if first.entry.name != "logits" or first.entry.rows != slice(None):
        return None
    x = ours["ln_f"].exact.reshape(-1, case.sizes()["n_embd"])
    if len(x) <= x.shape[1] + 2:
        return None
    for logits in first.entry.arrays:
        flat = logits.reshape(len(x), -1)
        head, *_ = np.linalg.lstsq(x, flat, rcond=None)
        if distance(x @ head, flat).rms < 0.01 * first.theirs.rms:
            text = "the head is a matrix other than wte, but GPT-2 ties the two"
            evidence = "These logits are the right stream times some matrix"
            return Cause(text, 1, 1, evidence=evidence)
    return None


def find_precision(first, after, ours, case):
    """Finds out whether a shorter dtype explains the differences."""
    for dtype in ("float16", "bfloat16"):
        if UNITS[dtype] <= UNITS[case.dtype]:
            continue
        shorter = case._replace(params=casts(case.params["float64"], dtype), dtype=dtype)
        kinds = {names.split_kind(d.entry.name)[0] for d in after}
        theirs = twins(shorter, kinds)
        same = [measure(d.entry, theirs, shorter).agrees for d in after]
        if same[0]:
            evidence = f"With --dtype {dtype} it agrees"
            return Cause(f"sums or results in {dtype}", sum(same), len(same), evidence=evidence)
    return None
