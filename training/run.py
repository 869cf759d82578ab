"""A training run, from its flags to the best model: one loop for train_jax.py and backprop.py.

A trainer does the computing. There are two, train_jax.JaxTrainer and backprop.NumpyTrainer, with
the same attributes and methods:

    running(options)                    a context, which gives what is computed on: "cpu", "gpu" ...
    Trainer(flags)                      what the flags decide, such as the schedule
    is_main                             whether this process writes and prints: of several, one does
    versions                            {library: version}
    steps_per_call, seconds_per_call    a call takes as many of these steps as take no more seconds
    new_model(n_vocab)                  -> hparams, params
    moment_shapes(params)               -> {name: (shape, dtype)} of the optimizer's moments
    start(model, moments, n_done, text) -> State; moments: a checkpoint's, {name: array}, or None
    machine()                           -> progress.Machine, the same in all processes
    read(n_done, n)                     -> batches for n steps, after the first n_done
    steps(state, batches, n)            -> State after n more steps, the means of their Stats
    learning_rate(n_done)               -> the next step's
    averaged(state)                     -> the parameters to validate: with --ema their average
    validate(params)                    -> nats per token of the validation text
    measure_tasks(params)               -> {name: share that is right}, of --eval_tasks
    generate(prompts, params, n_head, n_tokens_to_generate, **options)    as kv_cache.generate
    gather_params(params)               -> the parameters that are trained, in NumPy's arrays
    gather(state)                       -> State in NumPy's arrays, its moments by name
    agree(signals)                      -> the signal that this or another process caught, or 0
    close()                             ends the processes that it has started

The state's parameters and moments are in the trainer's own form; do not use a state after `steps`
got it. Of several processes each calls every method. No JAX here.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import signal
import sys
import time

from tqdm import tqdm

from encoder import get_encoder
from plumbing.cli import note_signals
from training import progress
from training.adapters import adapt, base_fingerprint, base_name, count_params, new_adapters
from training.checkpoints import (
    check_out,
    delete_half_written,
    find_checkpoint,
    find_out,
    load_checkpoint,
    offering_earlier,
    save_checkpoint,
    save_params,
    with_full_paths,
)
from training.curves import compare, expected_losses
from training.estimate import check_memory, in_words, least_bytes, released_hparams
from training.flags import check_saved, choose, extend
from training.snapshots import delete_snapshots, snapshot_steps, write_snapshot
from training.text import check_data, describe, open_text
from utils import (
    MissingBase,
    Model,
    check_base,
    find_model,
    load_encoder_hparams_and_params,
    target_dir,
)

SAMPLE_TEMPERATURE = 0.8


def run(trainer_class, typed, options):
    """Train as the flags ask: typed and options are read_flags' answers."""
    # --- What can go wrong goes wrong before JAX starts, and before any step ---
    if options.tensorboard:
        progress.import_writer()
    checkpoint = base_dir = None
    n_done = 0
    if options.resume is not None:
        out = find_out(options.resume, options.models_dir)
        checkpoint = find_checkpoint(out)
        with offering_earlier(out, checkpoint.folder, read_saved):
            flags = read_saved(checkpoint)
        n_done = checkpoint.metadata["step"]
        flags = extend(flags, n_done, typed.get("n_steps")) | {"out": out}
        flags = with_new_places(flags, typed, options.models_dir)
    else:
        typed = typed | {"out": target_dir(typed["out"], options.models_dir)}
        check_out(typed["out"], options.overwrite, "lora_rank" in typed)
        if "init_from" in typed:
            check_data(typed.get("data"))  # before a download in vain

    with contextlib.ExitStack() as stack:
        # --- The model to start from, which decides flags of a new run, and the trainer ---
        platform = stack.enter_context(trainer_class.running(options))
        model = moments = None
        if "init_from" in typed and checkpoint is None:
            base_dir = find_base(typed, platform, options.models_dir)
            if "lora_rank" in typed:
                typed = typed | {"init_from": base_name(typed["init_from"], options.models_dir)}
            model = load_encoder_hparams_and_params(base_dir, options.models_dir)
        if checkpoint is None:
            flags = choose(typed, platform, model and model.hparams)
        trainer = stack.enter_context(contextlib.closing(trainer_class(flags)))
        if checkpoint:
            load = functools.partial(
                load_all, flags, trainer.moment_shapes, options.models_dir, typed.get("init_from")
            )
            with offering_earlier(out, checkpoint.folder, load):
                model, moments = load(checkpoint)

        # --- The text, and what is learned from it ---
        encoder = model and model.encoder
        if "tokenizer" in flags and model is None:
            folder = find_model(flags["tokenizer"], options.models_dir, only_tokenizer=True)
            encoder = get_encoder("", folder)
        described = checkpoint and checkpoint.metadata["text"]
        text = open_text(flags["data"], encoder, flags["n_ctx"], described)
        n_vocab = model.hparams["n_vocab"] if model else text.encoder.n_vocab
        check_memory(flags | {"n_vocab": n_vocab}, flags, platform)
        if model is None:
            model = Model(text.encoder, *trainer.new_model(text.encoder.n_vocab))
        model = model._replace(encoder=text.encoder)
        if "lora_rank" in flags:
            description = text.description | {"base": base_fingerprint(model.params)}
            text = text._replace(description=description)
        if checkpoint:
            check_description(text.description, flags, checkpoint)
        elif "lora_rank" in flags:
            adapters = new_adapters(model.params, flags)
            model = model._replace(params=adapt(model.params, adapters))
        n_trained, n_frozen = count_params(model.params)
        state = trainer.start(model, moments, n_done, text)
        model, moments = model._replace(params=None), None  # their memory is free again

        # --- The machine, and how many steps make a call ---
        flops_per_param = 4 if "lora_rank" in flags else 6
        flops = progress.flops_per_token(model.hparams, flags["n_ctx"], flops_per_param)
        tokens_per_step = flags["n_accumulate"] * flags["batch_size"] * flags["n_ctx"]
        machine = trainer.machine()
        seconds = flops * tokens_per_step / machine.peak  # for a step, at best
        fitting = (n for n in trainer.steps_per_call if n * seconds < trainer.seconds_per_call)
        n_per_call = next(fitting, 1)

        # --- The folder that it writes ---
        output = Output(flags, model, text, trainer, checkpoint)
        beside = f" beside {n_frozen} frozen ones" if n_frozen else ""
        least = least_bytes(model.hparams, flags) / 1e6
        output.show(f"{n_trained} parameters{beside}, {describe(text)}")
        output.show(f"memory: at least {least:.3g} MB, without the activations")
        output.open_log(machine, flops, trainer, n_done, options.tensorboard)
        if checkpoint and n_done < flags["n_steps"]:
            rate, lowest = trainer.learning_rate(n_done), flags["min_learning_rate"]
            output.show(
                f"resuming {flags['out']} ({flags['recipe']}, on {flags['data']}) "
                f"after step {n_done} of {flags['n_steps']}: "
                f"the learning rate is {rate:.2g} now and {lowest:.2g} at the end"
            )

        # --- The steps ---
        if base_dir is not None:  # the model that it starts with is the best so far
            validate(trainer, state, output, "step 0:")
            measure_tasks(trainer, state, output)
        worst = 2 * math.log(model.hparams["n_vocab"])
        if output.best < math.inf:  # on an unfamiliar text the loss may start above it
            worst = max(worst, 2 * output.best)
        stopped = take_steps(trainer, state, flags, output, n_per_call, worst)
        if not stopped and n_done == flags["n_steps"]:
            output.show(
                f"all {n_done} steps were done already; a larger --n_steps continues the run"
            )
        if not stopped:
            output.show(f"the best model is in {flags['out']}")

    if stopped == signal.SIGINT:
        raise KeyboardInterrupt
    if stopped:
        sys.exit(128 + stopped)


def find_base(typed, platform, models_dir):  # -> the folder of the model to start from
    """A released model that can't be trained here is not even downloaded."""
    hparams = released_hparams(typed["init_from"])
    if hparams:
        check_memory(hparams, choose(typed, platform, hparams), platform)
    base_dir = find_model(typed["init_from"], models_dir)
    if "lora_rank" in typed:
        check_base(base_dir)
    return base_dir


# --- A checkpoint that is resumed ---------------------------------------------------------------


def read_saved(checkpoint):  # -> the run's flags
    return check_saved(checkpoint.metadata, checkpoint.folder)


def with_new_places(flags, typed, models_dir):  # -> the run's flags
    """Replace the text's place and the frozen model's, if they have moved and new ones are typed.

    Raises FileNotFoundError if there is no text.
    """
    if "init_from" in typed and "lora_rank" not in flags:
        raise ValueError("this run's checkpoints are whole models: leave out --init_from")
    if "init_from" in typed:
        flags = flags | {"init_from": base_name(typed["init_from"], models_dir)}
    if "data" in typed:
        flags = flags | {"data": typed["data"]}
    try:
        check_data(flags["data"])
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no text at {flags['data']}: if it has moved, --data names its new place"
        ) from None
    return flags


def load_all(flags, moment_shapes, models_dir, base, checkpoint):  # -> Model, {name: array}
    folder = checkpoint.folder
    try:
        model, moments = load_checkpoint(folder, moment_shapes, models_dir, base)
    except MissingBase as error:
        raise MissingBase(f"{error}; if it has moved, --init_from names its new place") from None
    check_sizes(flags, model.hparams, folder)
    return model, moments


def check_sizes(flags, hparams, folder):
    """Raises ValueError if run.json and the model in a checkpoint do not fit together."""
    is_same = all(flags[name] == hparams[name] for name in ("n_layer", "n_head", "n_embd"))
    if not is_same or flags["n_ctx"] > hparams["n_ctx"]:
        raise ValueError(f"{folder}: run.json has other sizes than the model")


def check_description(description, flags, checkpoint):
    """Raises ValueError if a checkpoint was made with another text or another frozen model."""
    for key, value in checkpoint.metadata["text"].items():  # older checkpoints say less
        if key != "examples" and description.get(key) != value:  # a line for people
            name, noun = ("init_from", "model") if key == "base" else ("data", "text")
            raise ValueError(
                f"{flags[name]}: is not the {noun} that {checkpoint.folder} was trained on"
            )


# --- The steps ----------------------------------------------------------------------------------


def take_steps(trainer, state, flags, output, n_per_call, worst):
    """Take the steps that are left. Returns the signal that ended the run early, or 0.

    A step is followed by what is due after it, and the last step by everything. Raises ValueError,
    which names the last checkpoint, for a loss that is not below `worst` (NaN is not).
    """
    n_steps = flags["n_steps"]
    n_done = int(state.n_done)
    n_saved = n_done  # the steps that are in a checkpoint
    eval_every = flags["eval_every"]
    checkpoint_every = flags["checkpoint_every"]
    tasks_every = flags.get("eval_tasks_every", eval_every)
    tokens_per_step = flags["n_accumulate"] * flags["batch_size"] * flags["n_ctx"]
    is_compiled = is_timed = False
    disable = None if trainer.is_main else True
    bar = tqdm(total=n_steps, initial=n_done, unit="step", disable=disable)
    with bar, note_signals() as caught:
        batches = trainer.read(n_done, n_per_call)
        output.save_snapshot(trainer, state, n_done)
        while n_done < n_steps and not trainer.agree(caught):
            began = time.perf_counter()
            n_due = min(k - n_done % k for k in (eval_every, checkpoint_every, tasks_every))
            n = min(n_per_call, n_due, output.steps_to_snapshot(n_done), n_steps - n_done)
            state, stats = trainer.steps(state, batches, n)
            n_done += n
            batches = trainer.read(n_done, n_per_call)  # while the device is at work
            stats = {name: float(x) for name, x in stats._asdict().items()}
            loss = stats["loss"]
            if not loss < worst:
                rescue = (
                    f" (the last checkpoint is {output.checkpoint})" if output.checkpoint else ""
                )
                raise ValueError(
                    f"training diverged: the loss is {loss:.4g} at step {n_done}; "
                    f"lower --learning_rate{rescue}"
                )
            values = {"step": n_done} | stats
            if is_compiled:  # the first call's time is the compiler's
                seconds = time.perf_counter() - began
                values["tokens_per_second"] = n * tokens_per_step / seconds
                if not is_timed:
                    is_timed = True
                    left = in_words((n_steps - n_done) * seconds / n)
                    output.show(f"{n_steps - n_done} steps left, about {left}")
            is_compiled = True
            values_shown = output.log(values)
            with contextlib.suppress(OSError):  # a closed terminal must not end the run
                bar.set_postfix(values_shown, refresh=False)
                bar.update(n)
            is_last = n_done == n_steps
            if n_done % eval_every == 0 or is_last:
                validate(trainer, state, output, f"step {n_done}: train {loss:.4f},")
            if n_done % tasks_every == 0 or is_last:
                measure_tasks(trainer, state, output)
            if n_done % checkpoint_every == 0 or is_last:
                output.save_checkpoint(trainer.gather(state))
                n_saved = n_done
            output.save_snapshot(trainer, state, n_done)
        stopped = trainer.agree(caught)
        if stopped and n_done > n_saved:
            if output.best == math.inf:
                output.save_best(trainer.gather_params(trainer.averaged(state)))
            output.save_checkpoint(trainer.gather(state))
        if stopped and output.checkpoint:
            output.show(f"stopped after step {n_done}, which is saved in {output.checkpoint}")
    return stopped


def validate(trainer, state, output, words):
    """Measure the validation loss, save the model if it is the best, and show a sample.

    words: what stands before the loss.
    """
    params = trainer.averaged(state)
    loss = trainer.validate(params)
    step = int(state.n_done)
    values = {"step": step, "validation": loss}
    if step in output.expected:
        values["expected"] = output.expected[step]
    output.log(values)
    output.show(f"{words} validation {loss:.4f}")
    if step in output.expected and step == output.flags["n_steps"]:
        output.show(compare(loss, output.expected[step]))
    if loss < output.best:
        output.best = loss
        output.save_best(trainer.gather_params(params))
    output.show_sample(trainer.generate, params)


def measure_tasks(trainer, state, output):
    """Measure what --eval_tasks asks for, if anything."""
    shares = trainer.measure_tasks(trainer.averaged(state))
    if shares:
        step = int(state.n_done)
        output.log({"step": step} | shares)
        words = ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
        output.show(f"step {step}: {words}")


class Output:
    """What a run writes: lines for people, a log, the best model and checkpoints.

    Of several processes one writes (is_main); the others call the same methods, which do nothing.
    """

    def __init__(self, flags, model, text, trainer, checkpoint=None):
        """model: its tokenizer and sizes are written; checkpoint: what the run goes on from."""
        self.flags = with_full_paths(flags)
        self.out = flags["out"]
        self.model = model
        self.description = text.description
        self.expected = expected_losses(flags, text.description["training"])
        self.prompt = text.prompt
        self.versions = trainer.versions
        self.is_main = trainer.is_main
        self.is_unheard = False  # has printing failed?
        self.can_draw = True  # is there matplotlib?
        self.log = lambda values: {}  # what open_log opens
        self.number = secrets.randbits(48)  # by which the run knows its checkpoints
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
        """Lock the folder, which no other run may be writing, and open metrics.jsonl."""
        if self.is_main:
            self.log = progress.make_log(
                self.out, self.number, n_done, machine, flops, trainer.learning_rate,
                tensorboard,
            )  # fmt: skip
            delete_half_written(self.out)
            delete_snapshots(self.out, n_done if self.checkpoint else None)

    def show(self, text):
        """Print a line for people. If nobody can read it any more, the run goes on without."""
        if not self.is_main or self.is_unheard:
            return
        try:
            tqdm.write(text)
        except OSError:  # the reader of a pipe has gone, or the disk of a log is full
            self.is_unheard = True
            with contextlib.suppress(OSError, ValueError):  # what is left must not fail at the exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def show_sample(self, generate, params):
        """Show what the model writes after the text's prompt: 100 tokens of it at most."""
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

    def steps_to_snapshot(self, n_done):  # -> how many more steps to the next one
        return min((step - n_done for step in self.snapshots if step > n_done), default=math.inf)

    def save_snapshot(self, trainer, state, n_done):
        """If one is due. A disk that is full costs the snapshots, not the run."""
        if n_done not in self.snapshots:
            return
        params = trainer.gather_params(trainer.averaged(state))
        if self.is_main and self.has_room:
            try:
                write_snapshot(self.out, self.model.hparams, params, n_done)
            except OSError as error:
                self.has_room = False
                self.show(f"{error.strerror}: the run goes on without more snapshots")

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
        """Write loss.png. A run must not fail for a picture; if it needs a package, say so once."""
        if self.can_draw:
            try:
                progress.plot(self.out)
            except ImportError:
                self.can_draw = False
                self.show("no loss.png, which needs matplotlib: pip install matplotlib")
            except OSError:
                pass
