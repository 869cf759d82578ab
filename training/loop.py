"""What both trainers share: how a run starts, and its loop. No JAX here."""

import contextlib
import math
import time

from tqdm import tqdm

from encoder import get_encoder
from plumbing.cli import note_signals
from training import progress
from training.adapters import adapt, base_fingerprint, new_adapters
from training.checkpoints import from_anywhere, load_checkpoint, save_checkpoint, save_params
from training.text import open_text
from utils import find_model


def load_start(flags, moment_shapes, new_model, model, place, saved, models_dir):
    """What a run starts from: -> shards, windows, what a checkpoint says of both, model, moments.

    model: (tokenizer, hparams, parameters): the given ones, else the checkpoint's, else those of
    new_model(flags, n_vocab). The moments are the checkpoint's, in moment_shapes(params), or None.
    With --lora_rank the parameters hold adapters. ValueError if the checkpoint was made with other
    flags, another text or another frozen model.
    """
    moments = encoder = None
    if place:
        *model, moments = load_checkpoint(place, moment_shapes, models_dir)
        same = all(flags[name] == model[1][name] for name in ("n_layer", "n_head", "n_embd"))
        if not same or flags["n_ctx"] > model[1]["n_ctx"]:
            raise ValueError(f"{place}: run.json has other sizes than the model")
    if model:
        encoder = model[0]
    elif flags.get("tokenizer"):
        folder = find_model(flags["tokenizer"], models_dir, only_tokenizer=True)
        encoder = get_encoder("", folder)
    shards, windows, text, encoder = open_text(flags["data"], encoder, flags["n_ctx"])
    model = model or (encoder, *new_model(flags, encoder.n_vocab))
    if "lora_rank" in flags:
        text["base"] = base_fingerprint(model[2])
    for key, value in saved["text"].items() if saved else ():  # older checkpoints say less
        if text.get(key) != value:
            name, what = ("init_from", "model") if key == "base" else ("data", "text")
            raise ValueError(f"{flags[name]}: is not the {what} that {place} was trained on")
    if "lora_rank" in flags and not place:
        model = *model[:2], adapt(model[2], new_adapters(model[2], flags))
    return shards, windows, text, model, moments


def any_signal(caught):  # [signals] -> one of them, or 0
    return max(caught, default=0)


def train(
    state, flags, train_steps, read, validate, keep, checkpoint, log, start,
    quiet=False, agree=any_signal, measure=None,
):  # fmt: skip
    """Run the steps that are left and show progress. -> the signal that ended it early, or 0.

    read(n_done): batches for some steps; their first axis is the steps. validate(params): nats.
    keep(params, is_best) is called after each validation; checkpoint(state, best) at intervals, at
    the end and when a signal comes, and returns where it wrote; log(values) writes a line of
    metrics.jsonl and returns what the bar shows; measure(step, params, log), if given, measures
    how much the model gets right. start: {"place": the checkpoint that the run goes on from or
    None, "best": its best validation loss or None, "worst": a loss at which the run has failed}.
    ValueError, with the last checkpoint's place, for a loss that is not below "worst" (NaN is
    not). agree(the signals caught here): the signal that ends the run, or 0.
    """
    n_done, n_steps = int(state[2]), flags["n_steps"]
    place, n_saved, best = start["place"], n_done, start["best"]
    best = math.inf if best is None else best
    every = flags["eval_every"], flags["checkpoint_every"]
    every += (flags.get("eval_tasks_every", every[0]),)
    tokens_per_step = flags["n_accumulate"] * flags["batch_size"] * flags["n_ctx"]
    bar = tqdm(total=n_steps, initial=n_done, unit="step", disable=quiet or None)
    with bar, note_signals() as caught:
        batches, compiled = read(n_done), False
        while n_done < n_steps and not agree(caught):
            began = time.perf_counter()
            n = min(len(batches), n_steps - n_done, *(k - n_done % k for k in every))
            state, loss = train_steps(state, batches, n)
            n_done += n
            batches = read(n_done)  # while the device is at work
            loss = float(loss)
            if not loss < start["worst"]:
                last = f"the last checkpoint is {place}" if place else "there is no checkpoint"
                raise ValueError(f"the loss is {loss:.4g} at step {n_done}: {last}")
            values = {"step": n_done, "loss": loss}
            if compiled:  # the first call's time is the compiler's
                values["tokens_per_second"] = n * tokens_per_step / (time.perf_counter() - began)
            compiled = True
            bar.set_postfix(log(values), refresh=False)
            bar.update(n)
            if n_done % every[0] == 0 or n_done == n_steps:
                validation = validate(state[0])
                log({"step": n_done, "validation": validation})
                if not quiet:
                    tqdm.write(f"step {n_done}: train {loss:.4f}, validation {validation:.4f}")
                keep(state[0], validation < best)
                best = min(best, validation)
            if measure and (n_done % every[2] == 0 or n_done == n_steps):
                measure(n_done, state[0], log)
            if n_done % every[1] == 0 or n_done == n_steps:
                place, n_saved = checkpoint(state, best), n_done
        stopped = agree(caught)
        if stopped and n_done > n_saved:
            if best == math.inf:
                keep(state[0], True)
            place = checkpoint(state, best)
        if stopped and place and not quiet:
            tqdm.write(f"stopped after step {n_done}, which is saved in {place}")
    return stopped


def sample(generate, params, encoder, hparams, seed):  # -> some lines of text, set in
    """What the model writes after a line's end, up to 100 tokens of it. generate: kv_cache.py's."""
    n, how = min(100, hparams["n_ctx"] - 1), {"temperature": 0.8, "seed": seed}
    prompts = [encoder.encode("\n")]
    ids = generate(prompts, params, hparams["n_head"], n, endoftext=encoder.end_ids, **how)[0]
    lines = [line for line in encoder.decode(ids).splitlines() if line.strip()]
    return "\n".join("    " + line for line in lines)


def make_savers(
    flags, encoder, hparams, text, run, place, generate, versions,
    whole_model=lambda params: params, whole_state=lambda state: state, quiet=False,
):  # fmt: skip
    """-> keep(params, is_best) and checkpoint(state, best), as `train` takes them.

    text: what a checkpoint says of the text; run: the run's number; place: the checkpoint that the
    run goes on from, or None. whole_model(params) and whole_state(state) bring home what devices
    share: NumPy's arrays, moments by name. Every process calls all of it; one that is quiet writes
    nothing.
    """
    out, places = flags["out"], [place] if place else []
    flags = from_anywhere(flags)

    def keep(params, is_best):
        whole = whole_model(params)
        if is_best and not quiet:
            save_params(out, encoder, hparams, whole, flags, flags["saved_dtype"])
        written = sample(generate, params, encoder, hparams, flags["seed"])  # where they are
        if not quiet:
            tqdm.write(written)

    def checkpoint(state, best):
        params, moments, step = whole_state(state)
        if quiet:
            return out
        about = {"run": run, "flags": flags, "text": text}
        about |= {"best": best if best < math.inf else None, "versions": versions}
        save_checkpoint(out, places, step, params, moments, about, encoder, hparams)
        with contextlib.suppress(ImportError, OSError):  # a run must not fail for a picture
            progress.draw(out)
        return places[-1]

    return keep, checkpoint
