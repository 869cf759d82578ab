"""A training run, from its flags to the best model: one loop for train_jax.py and backprop.py.

A trainer does the computing. There are two, train_jax.JaxTrainer and backprop.NumpyTrainer, with
the same attributes and methods:

    running(options)                    a context that gives the platform: "cpu", "gpu" ...
    Trainer(flags)                      sets up what depends on the flags, such as the schedule
    is_main                             whether this process writes; only one of several does
    versions                            {library: version}
    steps_per_call, seconds_per_call    how many steps a call may take, and how many seconds
    new_model(n_vocab)                  -> hparams, params
    moment_shapes(params)               -> {name: (shape, dtype)} of the optimizer's moments
    start(model, moments, n_done, text) -> State; moments: a checkpoint's, {name: array}, or None
    machine()                           -> progress.Machine, the same in all processes
    read(n_done, n)                     -> batches for n steps, after the first n_done
    steps(state, batches, n)            -> State after n more steps, the means of their Stats
    learning_rate(n_done)               -> the learning rate of the next step
    averaged(state)                     -> the parameters to validate (with --ema, their average)
    validate(params)                    -> nats per token of the validation text
    measure_tasks(params)               -> {task: accuracy}, for --eval_tasks
    generate(prompts, params, n_head, n_tokens_to_generate, **options)    like kv_cache.generate
    gather_params(params)               -> the trained parameters, as NumPy arrays
    gather(state)                       -> State, as NumPy arrays, with its moments by name
    agree(signals)                      -> the signal that this or another process caught, or 0
    close()                             ends the processes that the trainer started

A state's parameters and moments are in the trainer's own form. Don't use a state after passing it
to `steps`. If there are several processes, each of them calls every method. Nothing here needs JAX.
"""

import contextlib
import functools
import math
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
    find_checkpoint,
    find_out,
    offering_earlier,
)
from training.curves import compare
from training.estimate import check_memory, in_words, least_bytes, released_hparams
from training.flags import choose, extend
from training.output import Output
from training.resume import check_description, load_all, read_saved, with_new_places
from training.text import check_data, describe, open_text
from utils import (
    Model,
    check_base,
    find_model,
    load_encoder_hparams_and_params,
    target_dir,
)


def run(trainer_class, typed, options):
    """Trains a model. typed, options: what read_flags returns."""
    # --- Check everything that can be checked before JAX starts, and before any step ---
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
            check_data(typed.get("data"))  # before a download for nothing

    with contextlib.ExitStack() as stack:
        # --- The starting model, which sets some of a new run's flags, and the trainer ---
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

        # --- The text and the parameters ---
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
        model, moments = model._replace(params=None), None  # frees their memory

        # --- The machine, and the number of steps per call ---
        flops_per_param = 4 if "lora_rank" in flags else 6
        flops = progress.flops_per_token(model.hparams, flags["n_ctx"], flops_per_param)
        machine = trainer.machine()
        n_per_call = choose_n_per_call(trainer, flops * tokens_per_step(flags) / machine.peak)

        # --- The output folder ---
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
        if base_dir is not None:  # the starting model is the best so far
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
    """Doesn't download a released model that can't be trained on this machine."""
    hparams = released_hparams(typed["init_from"])
    if hparams:
        check_memory(hparams, choose(typed, platform, hparams), platform)
    base_dir = find_model(typed["init_from"], models_dir)
    if "lora_rank" in typed:
        check_base(base_dir)
    return base_dir


def tokens_per_step(flags):
    return flags["n_accumulate"] * flags["batch_size"] * flags["n_ctx"]


def choose_n_per_call(trainer, seconds):  # seconds: the least that a step can take
    """Returns the largest number of steps per call that stays within the trainer's time."""
    fitting = (n for n in trainer.steps_per_call if n * seconds < trainer.seconds_per_call)
    return next(fitting, 1)


# --- The steps ----------------------------------------------------------------------------------


def take_steps(trainer, state, flags, output, n_per_call, worst):
    """Takes the remaining steps. Returns the signal that ended the run early, or 0.

    Whatever is due after a step is done then, and everything after the last step. Raises
    ValueError, which names the last checkpoint, if a loss is not below `worst` (NaN is not).
    """
    n_steps = flags["n_steps"]
    n_done = int(state.n_done)
    n_saved = n_done  # the last checkpoint has this many steps
    eval_every = flags["eval_every"]
    checkpoint_every = flags["checkpoint_every"]
    tasks_every = flags.get("eval_tasks_every", eval_every)
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
            batches = trainer.read(n_done, n_per_call)  # while the device is computing
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
            if is_compiled:  # the first call mostly compiles
                seconds = time.perf_counter() - began
                values["tokens_per_second"] = n * tokens_per_step(flags) / seconds
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
    """Measures the validation loss, saves the model if it is the best, and shows a sample.

    words: the beginning of the line that shows the loss.
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
    """Measures the accuracy on --eval_tasks, if there are any."""
    shares = trainer.measure_tasks(trainer.averaged(state))
    if shares:
        step = int(state.n_done)
        output.log({"step": step} | shares)
        words = ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
        output.show(f"step {step}: {words}")
