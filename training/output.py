"""What a training run writes: lines for people, a log, the best model, checkpoints, snapshots."""

import contextlib
import json
import math
import os
import secrets
import sys

from tqdm import tqdm

from training import progress
from training.checkpoints import (
    delete_half_written,
    save_checkpoint,
    save_params,
    with_full_paths,
)
from training.curves import expected_losses
from training.snapshots import delete_snapshots, snapshot_steps, write_snapshot

SAMPLE_TEMPERATURE = 0.8


class Output:
    """Writes what a run produces: lines for people, a log, the best model and checkpoints.

    If there are several processes, one of them writes (is_main). In the others these methods do
    nothing.
    """

    def __init__(self, flags, model, text, trainer, checkpoint=None):
        """model: for its tokenizer and sizes. checkpoint: the one that the run continues from."""
        self.flags = with_full_paths(flags)
        self.out = flags["out"]
        self.model = model
        self.description = text.description
        self.expected = expected_losses(flags, text.description["training"])
        self.prompt = text.prompt
        self.versions = trainer.versions
        self.is_main = trainer.is_main
        self.cannot_print = False
        self.can_draw = True  # False if matplotlib is missing
        self.log = lambda values: {}  # replaced by open_log
        self.number = secrets.randbits(48)  # by which the run recognizes its checkpoints
        self.checkpoint = None  # the folder of the last one
        self.best = math.inf  # the lowest validation loss
        n_snapshots = flags.get("snapshots")
        self.snapshots = snapshot_steps(flags["n_steps"], n_snapshots) if n_snapshots else []
        self.has_room = True  # for snapshots
        if checkpoint:
            self.number = checkpoint.metadata.get("run")
            self.checkpoint = checkpoint.folder
            if checkpoint.metadata["best"] is not None:
                self.best = checkpoint.metadata["best"]

    def open_log(self, machine, flops, trainer, n_done, tensorboard):
        """Locks the folder, so that no other run can write to it, and opens metrics.jsonl."""
        if self.is_main:
            self.log = progress.make_log(
                self.out, self.number, n_done, machine, flops, trainer.learning_rate,
                tensorboard,
            )  # fmt: skip
            delete_half_written(self.out)
            delete_snapshots(self.out, n_done if self.checkpoint else None)

    def show(self, text):
        """Prints a line for people. If the output is closed, the run continues without it."""
        if not self.is_main or self.cannot_print:
            return
        try:
            tqdm.write(text)
        except OSError:  # the reader of a pipe has gone, or the disk is full
            self.cannot_print = True
            with contextlib.suppress(OSError, ValueError):  # so that flushing at exit can't fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def show_sample(self, generate, params):
        """Shows at most 100 tokens that the model generates after the text's prompt."""
        encoder, hparams, _ = self.model
        n = min(100, hparams["n_ctx"] - len(self.prompt))
        [ids] = generate(
            [self.prompt], params, hparams["n_head"], n,
            endoftext=encoder.end_ids, temperature=SAMPLE_TEMPERATURE, seed=self.flags["seed"],
        )  # fmt: skip
        prompt = json.dumps(encoder.decode(self.prompt)[-60:], ensure_ascii=False)
        self.show(f"  a sample, at temperature {SAMPLE_TEMPERATURE}, after {prompt}:")
        lines = [line for line in encoder.decode(ids).splitlines() if line.strip()]
        self.show("\n".join("    " + line for line in lines))

    def save_best(self, params):
        if self.is_main:
            best = self.model._replace(params=params)
            save_params(self.out, best, self.flags, self.flags["saved_dtype"])

    def steps_to_snapshot(self, n_done):  # -> how many steps until the next one
        return min((step - n_done for step in self.snapshots if step > n_done), default=math.inf)

    def save_snapshot(self, trainer, state, n_done):
        """Saves a snapshot if one is due. If the disk is full, the run continues without them."""
        if n_done not in self.snapshots:
            return
        params = trainer.gather_params(trainer.averaged(state))
        if self.is_main and self.has_room:
            try:
                write_snapshot(self.out, self.model.hparams, params, n_done)
            except OSError as error:
                self.has_room = False
                self.show(f"{error.strerror}: the run continues without more snapshots")

    def save_checkpoint(self, state):
        if not self.is_main:
            return
        metadata = {
            "run": self.number,
            "flags": self.flags,
            "text": self.description,
            "best": self.best if self.best < math.inf else None,
            "versions": self.versions,
        }
        previous = self.checkpoint
        self.checkpoint = save_checkpoint(self.out, self.model, state, metadata, previous)
        self.draw()

    def draw(self):
        """Draws loss.png. Nothing here ends the run. Says once if matplotlib is missing."""
        if self.can_draw:
            try:
                progress.plot(self.out)
            except ImportError:
                self.can_draw = False
                self.show("loss.png needs matplotlib: pip install matplotlib")
            except OSError:
                pass
