"""A training run, from its flags to the best model: one loop for train_jax.py and backprop.py.

A trainer does the computing. There are two, train_jax.JaxTrainer and backprop.NumpyTrainer, with
the same attributes and methods:

    running(options)                    a context, which gives what is computed on: "cpu", "gpu" ...
    Trainer(flags)                      what the flags decide, such as the schedule
    is_main                             whether this process writes and prints: of several, one does
    versions                            {library: version}
    new_model(n_vocab)                  -> hparams, params
    moment_shapes(params)               -> {name: (shape, dtype)} of the optimizer's moments
    start(model, moments, n_done, text) -> State; moments: a checkpoint's, {name: array}, or None
    machine()                           -> progress.Machine
    steps_per_call(seconds)             -> how many steps `steps` takes, of at least so many seconds
    read(n_done, n)                     -> batches for n steps, after the first n_done
    steps(state, batches, n)            -> State after n more steps, their mean loss
    learning_rate(n_done)               -> the next step's
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
import math
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
    save_checkpoint,
    save_params,
    with_full_paths,
)
from training.flags import check_saved, choose, extend
from training.text import check_data, describe, open_text
from utils import Model, check_base, find_model, load_encoder_hparams_and_params


def run(trainer_class, typed, options):
    """Train as the flags ask: typed and options are read_flags' answers."""
    if options.tensorboard:
        progress.import_writer()

    # --- What can go wrong goes wrong before JAX starts, and before any step ---
    checkpoint = base_dir = None
    if options.resume is not None:
        out = find_out(options.resume, options.models_dir)
        checkpoint = find_checkpoint(out)
        flags = check_saved(checkpoint.metadata, checkpoint.folder)
        flags = extend(flags, checkpoint.metadata["step"], typed.get("n_steps")) | {"out": out}
    else:
        flags, is_adapter = typed, "lora_rank" in typed
        check_out(flags["out"], options.overwrite, is_adapter)
        if "init_from" in flags:
            check_data(flags.get("data"))  # before a download in vain
            base_dir = find_model(flags["init_from"], options.models_dir)
            if is_adapter:
                check_base(base_dir)
                flags = flags | {"init_from": base_name(flags["init_from"], options.models_dir)}

    with trainer_class.running(options) as platform:
        stopped = train(trainer_class, flags, options, platform, checkpoint, base_dir)
    if stopped == signal.SIGTERM:
        sys.exit(143)
    if stopped:
        raise KeyboardInterrupt


def train(trainer_class, flags, options, platform, checkpoint=None, base_dir=None):
    """Train from the beginning, from the model in base_dir, or from a checkpoint.

    flags: the run's, if there is a checkpoint; otherwise the typed ones. Returns the signal that
    ended the run early, or 0.
    """
    # --- The flags ---
    model = moments = None
    if base_dir is not None:
        model = load_encoder_hparams_and_params(base_dir, options.models_dir)
    if checkpoint is None:
        flags = choose(flags, platform, model and model.hparams)
    n_done = checkpoint.metadata["step"] if checkpoint else 0

    with contextlib.closing(trainer_class(flags)) as trainer:
        show = tqdm.write if trainer.is_main else lambda text: None

        # --- The text, the parameters and the moments ---
        if checkpoint:
            folder = checkpoint.folder
            model, moments = load_checkpoint(folder, trainer.moment_shapes, options.models_dir)
            check_sizes(flags, model.hparams, folder)
        encoder = model.encoder if model else load_tokenizer(flags, options.models_dir)
        text = open_text(flags["data"], encoder, flags["n_ctx"])
        if model is None:
            model = Model(text.encoder, *trainer.new_model(text.encoder.n_vocab))
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
        beside = f" beside {n_frozen} frozen ones" if n_frozen else ""
        show(f"{n_trained} parameters{beside}, {describe(text)}")

        # --- The machine, and how many steps make a call ---
        flops_per_param = 4 if "lora_rank" in flags else 6
        flops = progress.flops_per_token(model.hparams, flags["n_ctx"], flops_per_param)
        machine = trainer.machine()
        n_per_call = trainer.steps_per_call(flops * tokens_per_step(flags) / machine.peak)

        # --- The folder that it writes ---
        number = checkpoint.metadata.get("run") if checkpoint else secrets.randbits(48)
        metadata = {"run": number, "flags": with_full_paths(flags), "text": text.description}
        output = Output(flags["out"], model, metadata, trainer.versions, trainer.is_main)
        if checkpoint:
            output.checkpoint = checkpoint.folder
            if checkpoint.metadata["best"] is not None:
                output.best = checkpoint.metadata["best"]
        if trainer.is_main:
            output.log = progress.make_log(
                flags["out"], number, n_done, machine, flops, trainer.learning_rate,
                options.tensorboard, flops_per_param,
            )  # fmt: skip
            delete_half_written(
                flags["out"]
            )  # no other run is at work there, or make_log would have refused
        if checkpoint and n_done < flags["n_steps"]:
            rate, lowest = trainer.learning_rate(n_done), flags["min_learning_rate"]
            show(
                f"going on after step {n_done} of {flags['n_steps']}: "
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
            show(f"all {n_done} steps were done: --n_steps goes on, with a larger number")
        if not stopped:
            show(f"the best model is in {flags['out']}")
    return stopped


# --- What it starts from ------------------------------------------------------------------------


def load_tokenizer(flags, models_dir):  # -> the one that --tokenizer names, or None
    if "tokenizer" not in flags:
        return None
    return get_encoder("", find_model(flags["tokenizer"], models_dir, only_tokenizer=True))


def check_sizes(flags, hparams, folder):
    """Raises ValueError if run.json and the model in a checkpoint do not fit together."""
    is_same = all(flags[name] == hparams[name] for name in ("n_layer", "n_head", "n_embd"))
    if not is_same or flags["n_ctx"] > hparams["n_ctx"]:
        raise ValueError(f"{folder}: run.json has other sizes than the model")


def check_description(description, flags, checkpoint):
    """Raises ValueError if a checkpoint was made with another text or another frozen model."""
    for key, value in checkpoint.metadata["text"].items():  # older checkpoints say less
        if description.get(key) != value:
            name, noun = ("init_from", "model") if key == "base" else ("data", "text")
            raise ValueError(
                f"{flags[name]}: is not the {noun} that {checkpoint.folder} was trained on"
            )


# --- The steps ----------------------------------------------------------------------------------


def tokens_per_step(flags):
    return flags["n_accumulate"] * flags["batch_size"] * flags["n_ctx"]


def take_steps(trainer, state, flags, output, n_per_call, worst):
    """Take the steps that are left. Returns the signal that ended the run early, or 0.

    A step is followed by what is due after it, and the last step by everything. Raises ValueError,
    which names the last checkpoint, for a loss that is not below `worst` (NaN is not).
    """
    n_steps, n_done = flags["n_steps"], int(state.n_done)
    n_saved = n_done  # the steps that are in a checkpoint
    eval_every, checkpoint_every = flags["eval_every"], flags["checkpoint_every"]
    tasks_every = flags.get("eval_tasks_every", eval_every)
    is_compiled = False
    disable = None if trainer.is_main else True
    bar = tqdm(total=n_steps, initial=n_done, unit="step", disable=disable)
    with bar, note_signals() as caught:
        batches = trainer.read(n_done, n_per_call)
        while n_done < n_steps and not trainer.agree(caught):
            began = time.perf_counter()
            n_due = min(k - n_done % k for k in (eval_every, checkpoint_every, tasks_every))
            n = min(n_per_call, n_due, n_steps - n_done)
            state, loss = trainer.steps(state, batches, n)
            n_done += n
            batches = trainer.read(n_done, n_per_call)  # while the device is at work
            loss = float(loss)
            if not loss < worst:
                rescue = "there is no checkpoint"
                if output.checkpoint:
                    rescue = f"the last checkpoint is {output.checkpoint}"
                raise ValueError(f"the loss is {loss:.4g} at step {n_done}: {rescue}")
            values = {"step": n_done, "loss": loss}
            if is_compiled:  # the first call's time is the compiler's
                seconds = time.perf_counter() - began
                values["tokens_per_second"] = n * tokens_per_step(flags) / seconds
            is_compiled = True
            bar.set_postfix(output.log(values), refresh=False)
            bar.update(n)
            is_last = n_done == n_steps
            if n_done % eval_every == 0 or is_last:
                validate(trainer, state, output, f"step {n_done}: train {loss:.4f},")
            if n_done % tasks_every == 0 or is_last:
                measure_tasks(trainer, state, output)
            if n_done % checkpoint_every == 0 or is_last:
                output.save_checkpoint(trainer.gather(state))
                n_saved = n_done
        stopped = trainer.agree(caught)
        if stopped and n_done > n_saved:
            if output.best == math.inf:
                output.save_best(trainer.gather_params(state.params))
            output.save_checkpoint(trainer.gather(state))
        if stopped and output.checkpoint:
            output.show(f"stopped after step {n_done}, which is saved in {output.checkpoint}")
    return stopped


def validate(trainer, state, output, words):
    """Measure the validation loss, save the model if it is the best, and show a sample.

    words: what stands before the loss.
    """
    loss = trainer.validate(state.params)
    output.log({"step": int(state.n_done), "validation": loss})
    output.show(f"{words} validation {loss:.4f}")
    if loss < output.best:
        output.best = loss
        output.save_best(trainer.gather_params(state.params))
    output.show_sample(trainer.generate, state.params)


def measure_tasks(trainer, state, output):
    """Measure what --eval_tasks asks for, if anything."""
    shares = trainer.measure_tasks(state.params)
    if shares:
        step = int(state.n_done)
        output.log({"step": step} | shares)
        words = ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
        output.show(f"step {step}: {words}")


class Output:
    """What a run writes: lines for people, a log, the best model and checkpoints.

    Of several processes one writes (is_main); the others call the same methods, which do nothing.
    """

    def __init__(self, out, model, metadata, versions, is_main):
        """model: its tokenizer and sizes are written. metadata, versions: for run.json."""
        self.out = out
        self.model = model
        self.metadata = metadata
        self.versions = versions
        self.is_main = is_main
        self.checkpoint = None  # the folder of the last one
        self.best = math.inf  # the lowest validation loss
        self.log = lambda values: {}  # make_log's, in the process that writes

    def show(self, text):
        if self.is_main:
            tqdm.write(text)

    def show_sample(self, generate, params):
        """Show some lines that the model writes after a line's end: 100 tokens of it at most."""
        encoder, hparams, _ = self.model
        n = min(100, hparams["n_ctx"] - 1)
        seed = self.metadata["flags"]["seed"]
        [ids] = generate(
            [encoder.encode("\n")], params, hparams["n_head"], n,
            endoftext=encoder.endoftext, temperature=0.8, seed=seed,
        )  # fmt: skip
        lines = [line for line in encoder.decode(ids).splitlines() if line.strip()]
        self.show("\n".join("    " + line for line in lines))

    def save_best(self, params):
        if self.is_main:
            flags = self.metadata["flags"]
            save_params(self.out, self.model._replace(params=params), flags, flags["saved_dtype"])

    def save_checkpoint(self, state):
        if not self.is_main:
            return
        best = self.best if self.best < math.inf else None
        metadata = self.metadata | {"best": best, "versions": self.versions}
        previous = self.checkpoint
        self.checkpoint = save_checkpoint(self.out, self.model, state, metadata, previous)
        with contextlib.suppress(ImportError, OSError):  # a run must not fail for a picture
            progress.plot(self.out)
