"""Turns text into token shards for train_jax.py. Files can have any size, and memory stays small.

    python prepare.py stories/*.txt --out shards/stories                    # byte-level
    python prepare.py corpus.jsonl.gz --tokenizer 124M --out shards/corpus  # GPT-2's tokens
    python prepare.py corpus/ --train_tokenizer 8192 --out shards/learned   # tokens of its own

The parent process cuts the files into spans of about 32 MB that end where a document ends, and
reads only a little of each. A job is one or more spans. A worker seeks to the start of a span, then
reads, encodes and writes a megabyte at a time. So its memory doesn't grow with the span or the
document (only a line of JSON, or 64 rows of Parquet, are in memory as a whole). It writes the job's
shards under other names, renames them when they are complete, and finally writes a note of their
contents. A job with a note is not done again, so a killed run continues where it stopped. Cuts,
order and random numbers depend only on the files, so one worker and a cluster write the same bytes.
Compressed files and standard input cannot be cut in place, so the parent unpacks them, one span at
a time, into files for the workers.

A document ends at <|endoftext|>, at a line that holds only --separator, and at the end of a file.
In JSON lines and Parquet it also ends at the end of each row. (If <|endoftext|> is alone in its
line, the line's end is dropped with it.) The id of <|endoftext|> is written after each document,
and nothing else changes. corpus/documents.py reads the files, and corpus/jobs.py writes the shards.
A folder of shards holds:

    train_000000.bin ..., val_000000.bin ...   ids, little-endian uint16 (uint32 above 65535 ids)
    meta.json                                  the contents and sources, written last of all
    vocab.json, merges.txt, tokenizer.json ... the tokenizer
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # python -P and -I leave this folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import encoder as encoder_module
from corpus.documents import (
    Options,
    cut_source,
    delete_unpacked,
    describe,
    find_files,
    is_same,
    notice,
    notice_null,
    notice_replaced,
    read_span,
)
from corpus.jobs import SPLITS, WORK, Job, do_job, encoders, make_jobs, read_or_empty
from corpus.shards import SHARD, open_prepared
from corpus.workers import run_here, run_pool, run_ray
from encoder import ENDOFTEXT, Encoder, get_encoder
from plumbing.cli import count
from plumbing.files import open_locked, write_whole

TRAINING_BYTES = 10**8  # the most text that a tokenizer learns from, give or take a document
TOKENIZER = ["vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"]
DELETABLE = re.compile(  # the files that this program writes in the shards' folder
    rf"{SHARD.pattern}|({'|'.join(map(re.escape, TOKENIZER))})(\.\d+\.tmp)?|meta\.json\.\d+\.tmp"
)


# --- The whole run ------------------------------------------------------------------------------


def begin(out, plan):  # -> whether there is anything to do
    """Compares the plan with the contents of `out`, and deletes unfinished work of earlier runs.

    The work of a run with the same plan is kept, unless it read standard input. Raises ValueError
    if the folder holds the shards of another run, or other files.
    """
    work_dir = os.path.join(out, WORK)
    complete = read_or_empty(os.path.join(out, "meta.json")).get("plan")
    begun = read_or_empty(os.path.join(work_dir, "plan.json"))
    repeatable = plan["sources"][0]["name"] != "-"  # standard input may be a different text now
    if complete == plan and repeatable:
        open_prepared(Path(out))  # raises ValueError or OSError for a missing or damaged shard
        return False
    names = set(os.listdir(out)) - {WORK}
    if begun:
        names -= set(TOKENIZER)
    if complete or (names and begun != plan):
        earlier = complete if isinstance(complete, dict) else begun
        differences = ", ".join(key for key in plan if earlier and earlier.get(key) != plan[key])
        problem = "is not empty"
        if differences:
            problem = f"holds the shards of another run (other {differences})"
        raise ValueError(f"{out} {problem}; remove it, or name another folder with --out")
    if begun != plan or not repeatable:
        for name in set(os.listdir(work_dir)) - {"lock"}:
            os.unlink(os.path.join(work_dir, name))
        for name in filter(DELETABLE.fullmatch, os.listdir(out)):
            os.unlink(os.path.join(out, name))
        write_whole(Path(work_dir, "plan.json"), json.dumps(plan))
    return True


def clean(out):
    """Deletes half-written files and, if there is nothing to continue, the work folder.

    Errors are ignored, because a run should end with the error of its work, not of its clean-up.
    """
    work_dir = os.path.join(out, WORK)
    for folder in (out, work_dir):
        for name in os.listdir(folder):
            deletable = folder == work_dir or DELETABLE.fullmatch(name)
            if deletable and name != "lock" and not name.endswith((".json", ".txt", ".bin")):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, name))
    if "meta.json" in os.listdir(out) or "plan.json" not in os.listdir(work_dir):
        shutil.rmtree(work_dir, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(out)  # works only if it is empty


def get_tokenizer(name, models_dir):  # -> Encoder
    """Returns the byte model if name is None, otherwise the tokenizer of that model."""
    from utils import find_model

    if name is None:
        return Encoder([])
    folder = find_model(name, models_dir, only_tokenizer=True)
    encoder = get_encoder("", folder)
    if encoder.endoftext is None:
        raise ValueError(
            f"{folder}: the tokenizer has no end token to separate documents; use another"
        )
    return encoder


def learn_tokenizer(n_vocab, sources, options, work_dir):  # -> Encoder
    """Learns from all of the text or, if it is over 100 MB, from 100 MB spread evenly over it."""
    if sources[0].name == "-":
        raise ValueError(
            "--train_tokenizer reads the text twice, so it cannot be used with standard input"
        )
    share = min(1.0, TRAINING_BYTES / max(1, sum(source.n_bytes for source in sources)))

    def texts():
        n_wanted = n_taken = 0
        for i, source in enumerate(sources):
            for span in cut_source(i, source, options, work_dir):
                n_wanted = min(n_wanted + share * span.size, TRAINING_BYTES)
                for part in itertools.chain.from_iterable(read_span(span, options)):
                    if n_taken >= n_wanted:
                        break
                    n_taken += len(part.text)
                    yield part.text.decode(errors="replace")
                delete_unpacked([span])

    return encoder_module.train(texts(), n_vocab)


def prepare(out, plan, sources, encoder, options, n_workers, ray):
    """Does the remaining work in a folder: the tokenizer, the shards, meta.json."""
    if all(os.path.exists(os.path.join(out, name)) for name in TOKENIZER):
        encoder = get_encoder("", out)  # left by an earlier run
    elif plan["train_tokenizer"]:
        work_dir = os.path.join(out, WORK)
        encoder = learn_tokenizer(plan["train_tokenizer"], sources, options, work_dir)
        if encoder.n_vocab < plan["train_tokenizer"]:
            notice(
                f"the tokenizer has only {encoder.n_vocab} entries, because the text has no more "
                "pairs to merge"
            )
    encoder.save(out)
    dtype = np.dtype("<u2" if encoder.n_vocab <= 2**16 else "<u4")
    encoders.clear()
    notes, sha256 = do_jobs(sources, out, options, dtype, n_workers, ray)
    for source in sources:
        if source.name != "-" and not is_same(source):
            raise ValueError(f"{source.name} changed while it was read; remove {out} and try again")
    if not any(sum(note["n_tokens"].values()) for note in notes):
        raise ValueError("there is no text in " + " ".join(source.name for source in sources[:9]))
    finish(out, plan, encoder, dtype, notes, sha256)


def do_jobs(sources, out, options, dtype, n_workers, ray):  # -> notes in order, {path: SHA-256}
    """Does all jobs, with a progress bar that counts the bytes of the sources."""
    from tqdm import tqdm

    work_dir = os.path.join(os.path.abspath(out), WORK)  # a full path, for other machines
    work = partial(do_job, out=os.path.abspath(out), options=options, dtype=dtype)
    files = [source.name for source in sources if source.name != "-"]
    groups = (files[i : i + 64] for i in range(0, len(files), 64))
    checksums = (Job(files={name: os.path.abspath(name) for name in group}) for group in groups)
    jobs = itertools.chain(make_jobs(sources, options, work_dir), checksums)
    total = None if len(files) < len(sources) else sum(source.n_bytes for source in sources)
    if ray:
        results = run_ray(jobs, work, ray)
    elif n_workers == 1 or (total is not None and total <= options.shard_bytes):
        results = run_here(jobs, work)
    else:
        results = run_pool(jobs, work, n_workers)
    notes = {}
    sha256 = {}
    n_tokens = 0
    start = time.monotonic()
    with (
        contextlib.closing(results),
        tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for job, note in results:
            if job.files:
                sha256 |= note
                continue
            delete_unpacked(job.spans)
            notes[job.number] = note
            n_tokens += sum(note["n_tokens"].values())
            speed = n_tokens / max(time.monotonic() - start, 1e-9) / 1e6  # some clocks tick slowly
            bar.set_postfix_str(f"{speed:.2f}M tokens/s", refresh=False)
            bar.update(sum(span.progress for span in job.spans))
    return [notes[number] for number in sorted(notes)], sha256


def finish(out, plan, encoder, dtype, notes, sha256):
    """Writes meta.json, which makes the folder complete."""

    def total(key):
        return {split: sum(note[key][split] for note in notes) for split in SPLITS}

    shards = {
        f"{split}_{number:06d}.bin": note["n_tokens"][split]
        for split in SPLITS
        for number, note in enumerate(notes)
        if note["n_tokens"][split]
    }
    meta = {
        "dtype": dtype.name,
        "n_vocab": encoder.n_vocab,
        "endoftext": encoder.endoftext,
    }
    meta |= {key: total(key) for key in ("n_tokens", "n_documents")}
    for key in ("n_bytes", "n_replaced", "n_null"):
        meta[key] = sum(note.get(key, 0) for note in notes)  # older notes lack n_null
    meta |= {"shards": shards, "sha256": dict(sorted(sha256.items())), "plan": plan}
    write_whole(Path(out, "meta.json"), json.dumps(meta, indent=1))


def report(out, meta):
    n_tokens, n_documents = meta["n_tokens"], meta["n_documents"]
    print(
        f"{out}: {count(len(meta['shards']), 'shard')}, {n_tokens['train']} training and "
        f"{n_tokens['val']} validation tokens, {count(sum(n_documents.values()), 'document')}, "
        f"{meta['n_vocab']} ids"
    )
    if meta["n_replaced"]:
        notice_replaced(meta["n_replaced"])
    if meta["n_null"]:
        notice_null(meta["n_null"])
    share = n_tokens["val"] / sum(n_tokens.values())
    fractions = [meta["plan"]["val_fraction"], meta["plan"]["last_fraction"]]
    if fractions[0] is None:
        fractions[0] = Options.val_fraction
    if not n_tokens["val"] and min(fractions) > 0:
        notice("no document is for validation; raise --val_fraction, or try another --seed")
    elif not min(fractions) / 3 <= share <= max(fractions) * 3:
        notice(
            f"validation has {share:.1%} of the tokens, because single documents are large; "
            "change --val_fraction, or try another --seed"
        )


def check_flags(inputs, out, separator, val_fraction, seed, shard_mb, workers, tokenizers):
    """Raises ValueError for flags that are wrong for any files."""
    if not inputs:
        raise ValueError("nothing to prepare; name files, folders, - or shakespeare")
    if "-" in inputs and len(inputs) > 1:
        raise ValueError("- (standard input) cannot be combined with other inputs")
    if out is None and (len(inputs) > 1 or inputs[0] == "-" or set("*?[") & set(inputs[0])):
        raise ValueError("name the folder for the shards with --out")
    if "\n" in separator or "\r" in separator:
        raise ValueError("separator must be a single line")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be 0 or more and below 2**64, not {seed}")
    if not 1e-6 <= shard_mb <= 1e6:
        raise ValueError(f"shard_mb must be from 0.000001 to 1000000, not {shard_mb}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be 1 or more, not {workers}")
    if None not in tokenizers:
        raise ValueError("--tokenizer and --train_tokenizer cannot be used together")
    if tokenizers[1] is not None and tokenizers[1] < 257:
        raise ValueError(f"train_tokenizer must be 257 (bytes and {ENDOFTEXT}) or more")


def main(
    *inputs: str,
    out: str | None = None,
    tokenizer: str | None = None,
    train_tokenizer: int | None = None,
    separator: str = ENDOFTEXT,
    field: str | None = None,
    val_fraction: float | None = None,
    seed: int = 1337,
    shard_mb: float = 32.0,
    workers: int | None = None,
    ray: str | None = None,
    models_dir: str = "models",
):
    """Turn text into token shards for train_jax.py.

    After an interruption, run the same command again. It continues where it stopped.

    Args:
        inputs: files, folders, patterns, - for standard input, or shakespeare (downloaded once).
        out: the folder for the shards; shards/NAME by default.
        tokenizer: 124M (GPT-2's), a folder in models_dir, or a path; bytes by default.
        train_tokenizer: learn a tokenizer of this many entries from the text itself.
        separator: a line that separates documents, in addition to <|endoftext|>; empty for blank
            lines.
        field: the field or column with the text in JSON lines and Parquet; "text" by default. If it
            is given, standard input and files of unknown kinds are read as JSON lines.
        val_fraction: the share of the documents for validation, 0.01 by default. If that is fewer
            than ten documents, the last part of the text is used instead, a tenth of it by default.
        seed: the same seed draws the same documents for validation.
        shard_mb: megabytes of text per shard.
        workers: the number of processes; by default, one per processor.
        ray: local, auto or an address, to use a Ray cluster, whose machines must all see the files.
        models_dir: the folder that holds the models.
    """
    from model_files.download import download_shakespeare

    tokenizers = (tokenizer, train_tokenizer)
    check_flags(inputs, out, separator, val_fraction, seed, shard_mb, workers, tokenizers)
    out = out or os.path.join("shards", Path(inputs[0]).absolute().name.split(".")[0])
    if inputs == ("shakespeare",) and not os.path.exists("shakespeare"):
        inputs = (download_shakespeare(),)
    options = Options(separator, field or "text", seed, shard_bytes=int(shard_mb * 1e6))
    if val_fraction is not None:
        options = replace(options, val_fraction=val_fraction, last_fraction=val_fraction)
    files = find_files(inputs, leave_out=out)
    sources = [describe(path, json_lines=field is not None) for path in files]
    encoder = None if train_tokenizer else get_tokenizer(tokenizer, models_dir)
    plan = {"tokenizer": tokenizer, "train_tokenizer": train_tokenizer, **asdict(options)}
    plan["val_fraction"] = val_fraction
    plan["merges"] = encoder and hashlib.sha256(repr(encoder.merges).encode()).hexdigest()
    plan["sources"] = [source._asdict() for source in sources]
    work_dir = os.path.join(out, WORK)
    os.makedirs(work_dir, exist_ok=True)
    try:
        with open_locked(os.path.join(work_dir, "lock"), wait=False):
            try:
                if begin(out, plan):
                    n_workers = workers or os.cpu_count()
                    prepare(out, plan, sources, encoder, options, n_workers, ray)
            finally:
                clean(out)
    except BlockingIOError:
        raise ValueError(
            f"{out}: another prepare.py is working there; wait for it, or name another --out"
        ) from None
    report(out, read_or_empty(os.path.join(out, "meta.json")))


if __name__ == "__main__":
    from plumbing.cli import run_cli

    run_cli(main)
