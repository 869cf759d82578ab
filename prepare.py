"""Text to token shards: what train_jax.py reads, made from files of any size in bounded memory.

    python prepare.py stories/*.txt --out shards/stories                    # byte-level
    python prepare.py corpus.jsonl.gz --tokenizer 124M --out shards/corpus  # GPT-2's tokens
    python prepare.py corpus/ --train_tokenizer 8192 --out shards/corpus    # tokens of its own

The parent process cuts the files into spans of some 32 MB that end where a document ends, reading
little of them. Spans make tasks. A worker that gets a task seeks, and then reads, encodes and
writes a megabyte at a time, so that its memory depends neither on the span nor on the document (of
JSON it holds a row, of Parquet 64); it writes the task's own shard under another name and renames
it when it is complete, and a note of what is in it comes last. What has its note is not done again:
a run that was killed goes on where it was. Cuts, order and numbers follow from the files alone:
with one worker or a cluster, the bytes are the same. Compressed files and standard input cannot be
cut in place: the parent unpacks them, a span at a time, into files that the workers then read.

Documents are parted by lines that hold only <|endoftext|> (or --separator), by files, and in JSON
lines and Parquet by the rows. Each ends with the id of <|endoftext|>; nothing else of them changes.
A folder of shards:

    train_000000.bin ..., val_000000.bin ...   ids, little-endian uint16 (uint32 above 65535 ids)
    meta.json                                  what is in them and where from; written last of all
    vocab.json, merges.txt                     the tokenizer
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import operator
import os
import re
import shutil
import signal
import sys
import threading
import time
import uuid
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np

import encoder as encoder_module
from documents import cut_source, describe, find_files, is_same, notice, read_span
from encoder import CHAR_OF_BYTE, ENDOFTEXT, Encoder, get_encoder
from files import open_locked, parse_json, write_whole
from shards import SHARD, open_prepared

TRAINING_BYTES = 10**8  # of text, and at most a document more, from which a tokenizer learns
SPLITS = ["train", "val"]
TOKENIZER = ["vocab.json", "merges.txt", "tokenizer_config.json"]
OURS = re.compile(  # what may be deleted in the folder of the shards
    rf"{SHARD.pattern}|({'|'.join(map(re.escape, TOKENIZER))})(\.\d+\.tmp)?|meta\.json\.\d+\.tmp"
)
WORK = ".work"  # the folder, in that of the shards, that holds what is not complete


# --- From spans to tasks ------------------------------------------------------------------------


def make_tasks(sources, options, work_dir):  # yields {"number": ..., "spans": [...]}
    """Spans in order, small ones together, so that a task has about shard_bytes to read."""
    cut = [cut_source(i, source, options, work_dir) for i, source in enumerate(sources)]
    spans = itertools.chain.from_iterable(cut)
    first = list(itertools.islice(spans, 2))
    if len(first) == 1:
        yield {"number": 0, "spans": cut_document(*first, options)}
        return
    group, size, numbers = [], 0, itertools.count()
    for span in itertools.chain(first, spans):
        group.append(span)
        size += span["size"]
        if size >= options["shard_bytes"]:
            yield {"number": next(numbers), "spans": group}
            group, size = [], 0
    if group:
        yield {"number": next(numbers), "spans": group}


def cut_document(span, options):  # -> the only span, or its two parts
    """If all there is is one document, its end is for validation, not all of it or nothing."""
    if span["format"] != "text":
        return [span]
    start, size = None, 0
    for position, text, _ in itertools.chain.from_iterable(read_span(span, options)):
        if start not in (None, position):
            return [span]  # a second document
        start, size = position, size + len(text)
    if start is None:
        return [span]
    with open(span["path"], "rb") as file:
        at = file.seek(start + int(size * (1 - options["last_fraction"])))
        following = file.read(3)  # a character is not cut
        at += len(following) - len(following.lstrip(bytes(range(0x80, 0xC0))))
    stop = start + size
    train = {"split": "train", "start": start, "stop": at, "ends": at == stop}
    val = {"split": "val", "start": at, "stop": stop, "progress": 0}
    return [span | train, span | val]


# --- A task: from documents to shards -----------------------------------------------------------

encoders = {}  # a worker reads the tokenizer once


def read_or_empty(path):
    """A JSON object, or an empty one where there is no such file, or a broken one."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return parse_json(Path(path).read_bytes(), path)
    return {}


def do_task(task, out, options):  # -> its note: counts of what is in its shards
    """Write the shards of a task and then its note, each whole or not at all.

    What another try at the same task does meanwhile, on a machine thought lost, harms nothing.
    """
    if "checksums" in task:
        return {name: checksum(path) for name, path in task["checksums"].items()}
    number, work_dir = f"{task['number']:06d}", os.path.join(out, WORK)
    shards = {split: os.path.join(out, f"{split}_{number}.bin") for split in SPLITS}
    names = {split: os.path.join(work_dir, f"{split}_{uuid.uuid4().hex}") for split in SPLITS}
    note_file = Path(work_dir, f"{number}.json")
    if is_done(note := read_or_empty(note_file), shards, options):
        return note
    if out not in encoders:
        encoders[out] = get_encoder("", out)
    try:
        note = write_shards(task["spans"], names, encoders[out], options)
        for split in SPLITS:
            if note["n_tokens"][split]:
                os.replace(names[split], shards[split])
            elif os.path.exists(shards[split]):  # of another draw
                os.unlink(shards[split])
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or out) from None
    finally:
        for name in names.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    write_whole(note_file, json.dumps(note))
    return note


def is_done(note, shards, options):
    """Is there a note of the same draw, and are its shards as large as it says?"""
    if note.get("val_fraction") != options["val_fraction"]:
        return False
    width = np.dtype(options["dtype"]).itemsize
    sizes = {split: os.path.getsize(p) for split, p in shards.items() if os.path.exists(p)}
    return all(sizes.get(split, 0) == width * n for split, n in note["n_tokens"].items())


def write_shards(spans, names, encoder, options):  # -> the note
    """Encode the documents of some spans into the files `names`, a split each, and count them."""
    note = {"n_tokens": dict.fromkeys(SPLITS, 0), "n_documents": dict.fromkeys(SPLITS, 0)}
    note |= {"n_bytes": 0, "n_replaced": 0, "least": 1.0, "val_fraction": options["val_fraction"]}
    with open(names["train"], "wb") as train, open(names["val"], "wb") as val:
        for span in spans:
            for parts in read_span(span, options):
                add_parts(parts, span, {"train": train, "val": val}, encoder, options, note)
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())
    return note


def add_parts(parts, span, files, encoder, options, note):
    """Encode some parts, append them to their split's file, and count them in the note."""
    drawn = [span["split"] == "val"] * len(parts)
    if span["split"] is None:
        positions = np.array([position for position, _, _ in parts], np.uint64)
        numbers = draw(positions + np.uint64(span["offset"]), span["source"], options["seed"])
        drawn = (numbers < options["val_fraction"]).tolist()
        note["least"] = min([note["least"], *numbers.tolist()])
    for split, chosen in ("train", map(operator.not_, drawn)), ("val", drawn):
        chosen = list(itertools.compress(parts, chosen))
        ends = [ends and span["ends"] for _, _, ends in chosen]
        texts, n_replaced = mend([text for _, text, _ in chosen])
        ids = encode(texts, ends, encoder, options["dtype"])
        files[split].write(ids)
        note["n_tokens"][split] += len(ids)
        note["n_documents"][split] += sum(ends)
        note["n_bytes"] += sum(map(len, texts))
        note["n_replaced"] += n_replaced


def draw(positions, source, seed):  # [n] uint64 -> [n] float64 from 0 to 1, a number a document
    """A hash of (seed, source, position), so that it does not depend on who asks, and when.

    The mixing function is splitmix64's (Steele et al. 2014).
    """
    key = np.random.SeedSequence([seed, source]).generate_state(1, np.uint64)
    x = key + positions * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)) * 2.0**-53


def mend(texts):  # [bytes] -> [UTF-8], how many invalid sequences became U+FFFD
    try:
        b"\n".join(texts).decode()
        return texts, 0
    except UnicodeDecodeError:
        mended = [text.decode(errors="replace").encode() for text in texts]
        sign = "\ufffd".encode()
        n_before, n_after = (sum(text.count(sign) for text in some) for some in (texts, mended))
        return mended, n_after - n_before


def encode(texts, ends, encoder, dtype):  # [UTF-8], [bool] -> [n] ids
    """The ids of texts, each followed by that of <|endoftext|> where the text ends."""
    if not encoder.merges:  # a table will do. The byte 0xFF, which is in no UTF-8, ends a document
        table = [encoder.vocab[CHAR_OF_BYTE[byte]] for byte in range(255)] + [encoder.endoftext]
        data = b"".join(itertools.chain(*zip(texts, (b"\xff"[:end] for end in ends), strict=True)))
        return np.array(table, dtype)[np.frombuffer(data, np.uint8)]
    ids = []
    for text, end in zip(texts, ends, strict=True):
        ids += encoder.encode(text.decode())
        if end:
            ids.append(encoder.endoftext)
    return np.fromiter(ids, dtype, len(ids))


def checksum(path):  # -> SHA-256, hexadecimal
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Three scales: this process, a pool of processes, a Ray cluster -----------------------------
# Each yields (task, note) as the tasks are done, in any order, and takes a new task only when one
# is done, so that what was unpacked does not pile up.


def run_here(tasks, work):
    for task in tasks:
        yield task, work(task)


def run_pool(tasks, work, n_workers):
    """OSError if a worker is killed. However this ends, no worker outlives it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, context, initializer=follow_parent) as pool:
        try:
            running = {}
            for task in tasks:
                with held_back(signal.SIGINT):  # a worker that is starting would print a traceback
                    running[pool.submit(work, task)] = task
                if len(running) == 2 * n_workers:
                    yield from finished(running)
            while running:
                yield from finished(running)
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker was killed, for want of memory perhaps: "
                "the same command goes on where this one stopped"
            ) from None
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def finished(running):
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


@contextlib.contextmanager
def held_back(sign):
    """A signal that comes now comes afterwards; in a process that starts now, when it allows it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [sign])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent():
    """Ends this worker at once on Ctrl-C, and when its parent is gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_ray(tasks, work, address):
    """Ray core tasks; Ray runs those of a lost machine again on another.

    The machines need Python with numpy and regex, and to see the files under the same names. The
    code travels with the tasks, by value.
    """
    try:
        import ray
    except ImportError:
        raise ImportError("--ray needs ray: pip install -r requirements-ray.txt") from None
    send_by_value(ray.cloudpickle)
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        # Many retries: for some seconds Ray goes on sending tasks to a machine that has died.
        remote, running = ray.remote(max_retries=100)(lambda task: work(task)), {}
        for task in itertools.chain(tasks, itertools.repeat(None)):
            if task:
                running[remote.remote(task)] = task
            elif not running:
                break
            if not task or len(running) >= 2 * ray.cluster_resources().get("CPU", 1):
                (done,), _ = ray.wait(list(running))
                yield running.pop(done), ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise ConnectionError(f"Ray: {error}") from None
    finally:
        ray.shutdown()


def send_by_value(cloudpickle):
    """Have all modules of this project travel with what is pickled."""
    for module in list(sys.modules.values()):
        folder = os.path.dirname(getattr(module, "__file__", None) or "")
        if folder == os.path.dirname(__file__) and module.__name__ != "__main__":  # which does so
            cloudpickle.register_pickle_by_value(module)


# --- The whole run ------------------------------------------------------------------------------


def begin(out, plan):  # -> whether there is anything to do
    """Compare the plan with what an earlier run left in the folder; ValueError if it is foreign."""
    work_dir = os.path.join(out, WORK)
    complete = read_or_empty(os.path.join(out, "meta.json")).get("plan")
    begun = read_or_empty(os.path.join(work_dir, "plan.json"))
    repeatable = plan["sources"][0]["name"] != "-"  # standard input may be another text now
    if complete == plan and repeatable:
        open_prepared(Path(out))  # ValueError or OSError if a shard is missing or damaged
        return False
    there = set(os.listdir(out)) - {WORK} - (set(TOKENIZER) if begun else set())
    if complete or (there and begun != plan):
        found = complete if isinstance(complete, dict) else begun
        other = ", ".join(key for key in plan if found and found.get(key) != plan[key])
        what = f"holds the shards of another run (other {other})" if other else "is not empty"
        raise ValueError(f"{out} {what}: remove it, or name another folder with --out")
    if begun != plan or not repeatable:
        for name in set(os.listdir(work_dir)) - {"lock"}:
            os.unlink(os.path.join(work_dir, name))
        for name in filter(OURS.fullmatch, os.listdir(out)):
            os.unlink(os.path.join(out, name))
        write_whole(Path(work_dir, "plan.json"), json.dumps(plan))
    return True


def clean(out):
    """Delete what is half done and, where there is nothing to go on with, the work folder.

    As far as it can be: the error that a run ends with is that of its work, not of its cleaning.
    """
    work_dir = os.path.join(out, WORK)
    for folder, name in [(d, name) for d in (out, work_dir) for name in os.listdir(d)]:
        ours = folder == work_dir or OURS.fullmatch(name)
        if ours and name != "lock" and not name.endswith((".json", ".txt", ".bin")):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, name))
    if "meta.json" in os.listdir(out) or "plan.json" not in os.listdir(work_dir):
        shutil.rmtree(work_dir, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(out)  # works only if it is empty


def get_tokenizer(name, models_dir):  # -> Encoder
    """Bytes for no name; else that of a released GPT-2, of a folder in models_dir, or of a path."""
    from utils import find_model

    if name is None:
        return Encoder([])
    folder = find_model(name, models_dir, only_tokenizer=True)
    encoder = get_encoder("", folder)
    if encoder.endoftext is None:
        raise ValueError(f"{folder}: its tokenizer has no {ENDOFTEXT}, which parts documents")
    return encoder


def learn_tokenizer(n_vocab, sources, options, work_dir):  # -> Encoder
    """From all of the text or, if there is more than 100 MB, from so much of all over it."""
    if sources[0]["name"] == "-":
        raise ValueError(
            "--train_tokenizer reads the text twice, which standard input does not allow"
        )
    share = min(1.0, TRAINING_BYTES / max(1, sum(source["n_bytes"] for source in sources)))

    def texts():
        n_wanted = n_taken = 0
        for task in make_tasks(sources, options, work_dir):
            for span in task["spans"]:
                n_wanted = min(n_wanted + share * span["size"], TRAINING_BYTES)
                for _, text, _ in itertools.chain.from_iterable(read_span(span, options)):
                    if n_taken >= n_wanted:
                        break
                    n_taken += len(text)
                    yield text.decode(errors="replace")
            delete_unpacked(task)

    return encoder_module.train(texts(), n_vocab)


def delete_unpacked(task):
    for path in {span["path"] for span in task["spans"] if span["temporary"]}:
        os.unlink(path)


def prepare(out, plan, encoder, options, n_workers, ray):
    """All that is left to do in a folder: the tokenizer, the shards, meta.json."""
    if all(os.path.exists(os.path.join(out, name)) for name in TOKENIZER):
        encoder = get_encoder("", out)  # an earlier run's
    elif plan["train_tokenizer"]:
        work_dir = os.path.join(out, WORK)
        encoder = learn_tokenizer(plan["train_tokenizer"], plan["sources"], options, work_dir)
    encoder.save(out)
    options = options | {"dtype": "<u2" if encoder.n_vocab <= 2**16 else "<u4"}
    encoders.clear()
    notes, sha256 = run(plan["sources"], out, options, n_workers, ray)
    n_documents = {split: sum(note["n_documents"][split] for note in notes) for split in SPLITS}
    again = plan["val_fraction"] is None and plan["sources"][0]["name"] != "-"  # read once only
    if again and n_documents["train"] > 1 and not n_documents["val"]:
        options["val_fraction"] = np.nextafter(min(note["least"] for note in notes), 1.0)
        notes, sha256 = run(plan["sources"], out, options, n_workers, ray)  # one document falls
    for source in plan["sources"]:
        if source["name"] != "-" and not is_same(source):
            raise ValueError(
                f"{source['name']} changed while it was read: remove {out} and try again"
            )
    if not any(sum(note["n_tokens"].values()) for note in notes):
        raise ValueError("there is no text in " + " ".join(s["name"] for s in plan["sources"][:9]))
    finish(out, plan, encoder, options, notes, sha256)


def run(sources, out, options, n_workers, ray):  # -> (notes in order, {path: its SHA-256})
    """Do all tasks, with a bar that counts the bytes of the sources."""
    from tqdm import tqdm

    work_dir = os.path.join(os.path.abspath(out), WORK)  # which other machines see as well
    work = partial(do_task, out=os.path.abspath(out), options=options)
    files = [source["name"] for source in sources if source["name"] != "-"]
    groups = (files[i : i + 64] for i in range(0, len(files), 64))
    checksums = ({"checksums": {f: os.path.abspath(f) for f in group}} for group in groups)
    tasks = itertools.chain(make_tasks(sources, options, work_dir), checksums)
    total = None if len(files) < len(sources) else sum(source["n_bytes"] for source in sources)
    if ray:
        results = run_ray(tasks, work, ray)
    elif n_workers == 1 or (total is not None and total <= options["shard_bytes"]):
        results = run_here(tasks, work)
    else:
        results = run_pool(tasks, work, n_workers)
    notes, sha256, n_tokens, start = {}, {}, 0, time.monotonic()
    with (
        contextlib.closing(results),
        tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for task, note in results:
            if "checksums" in task:
                sha256 |= note
                continue
            delete_unpacked(task)
            notes[task["number"]] = note
            n_tokens += sum(note["n_tokens"].values())
            speed = n_tokens / max(time.monotonic() - start, 1e-9) / 1e6  # some clocks tick slowly
            bar.set_postfix_str(f"{speed:.2f}M tokens/s", refresh=False)
            bar.update(sum(span["progress"] for span in task["spans"]))
    return [notes[number] for number in sorted(notes)], sha256


def finish(out, plan, encoder, options, notes, sha256):
    """Write meta.json, which makes the folder complete."""

    def total(key):
        return {split: sum(note[key][split] for note in notes) for split in SPLITS}

    shards = {
        f"{split}_{number:06d}.bin": note["n_tokens"][split]
        for split in SPLITS
        for number, note in enumerate(notes)
        if note["n_tokens"][split]
    }
    meta = {
        "dtype": np.dtype(options["dtype"]).name,
        "n_vocab": encoder.n_vocab,
        "endoftext": encoder.endoftext,
    }
    meta |= {key: total(key) for key in ("n_tokens", "n_documents")}
    meta |= {key: sum(note[key] for note in notes) for key in ("n_bytes", "n_replaced")}
    meta |= {"shards": shards, "sha256": dict(sorted(sha256.items())), "plan": plan}
    write_whole(Path(out, "meta.json"), json.dumps(meta, indent=1))


def report(out, meta):
    n_tokens, n_documents = meta["n_tokens"], meta["n_documents"]
    print(
        f"{out}: {len(meta['shards'])} shards, {n_tokens['train']} training and {n_tokens['val']} "
        f"validation tokens, {sum(n_documents.values())} documents, {meta['n_vocab']} ids"
    )
    if meta["n_replaced"]:
        notice(f"{meta['n_replaced']} sequences of bytes were no UTF-8 and became U+FFFD")
    if not n_tokens["val"] and meta["plan"]["val_fraction"] != 0:
        notice("no document fell to validation: raise --val_fraction, or draw with another --seed")


def check_flags(inputs, out, separator, val_fraction, seed, shard_mb, workers, tokenizers):
    """ValueError, one clear line, for what means nothing whatever the files."""
    if not inputs:
        raise ValueError("nothing to prepare: name files, folders, - or shakespeare")
    if "-" in inputs and len(inputs) > 1:
        raise ValueError("- (standard input) cannot be together with other inputs")
    if out is None and (len(inputs) > 1 or inputs[0] == "-" or set("*?[") & set(inputs[0])):
        raise ValueError("name the folder for the shards with --out")
    if "\n" in separator or "\r" in separator:
        raise ValueError("separator must be the content of one line")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be 0 or more, and below 2**64, not {seed}")
    if not 1e-6 <= shard_mb <= 1e6:
        raise ValueError(f"shard_mb must be from 0.000001 to 1000000, not {shard_mb}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be 1 or more, not {workers}")
    if None not in tokenizers:
        raise ValueError("--tokenizer and --train_tokenizer exclude each other")
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

    Run again after an interruption, the same command goes on where it was.

    Args:
        inputs: files, folders, patterns, - for standard input, or shakespeare (downloaded once).
        out: the folder for the shards; shards/NAME by default.
        tokenizer: 124M (GPT-2's), a folder in models_dir, or a path; bytes by default.
        train_tokenizer: learn a tokenizer of so many entries from the text itself.
        separator: the line that parts the documents of a text; empty for blank lines.
        field: where JSON lines and Parquet have the text; "text" by default. Naming it makes files
            of unknown kinds, and standard input, JSON lines.
        val_fraction: share of the documents for validation; by default 0.01, but one at the least.
            Of a text that is one document, the last tenth.
        seed: the same seed draws the same documents for validation.
        shard_mb: megabytes of text in a shard.
        workers: processes; by default, one a processor.
        ray: local, auto or an address: use a Ray cluster, whose machines all see the files.
        models_dir: the folder that holds the models.
    """
    from utils import download_shakespeare

    tokenizers = (tokenizer, train_tokenizer)
    check_flags(inputs, out, separator, val_fraction, seed, shard_mb, workers, tokenizers)
    out = out or os.path.join("shards", Path(inputs[0]).absolute().name.split(".")[0])
    if inputs == ("shakespeare",) and not os.path.exists("shakespeare"):
        inputs = (download_shakespeare(),)
    options = {"separator": separator, "field": field or "text", "seed": seed}
    options |= {"val_fraction": 0.01 if val_fraction is None else val_fraction}
    options |= {"last_fraction": 0.1 if val_fraction is None else val_fraction}
    options |= {"shard_bytes": int(shard_mb * 1e6)}
    files = find_files(inputs, leave_out=out)
    sources = [describe(path, json_lines=field is not None) for path in files]
    encoder = None if train_tokenizer else get_tokenizer(tokenizer, models_dir)
    plan = {"tokenizer": tokenizer, "train_tokenizer": train_tokenizer, **options}
    plan |= {"val_fraction": val_fraction}
    plan |= {"merges": encoder and hashlib.sha256(repr(encoder.merges).encode()).hexdigest()}
    plan |= {"sources": sources}
    work_dir = os.path.join(out, WORK)
    os.makedirs(work_dir, exist_ok=True)
    try:
        with open_locked(os.path.join(work_dir, "lock"), wait=False):
            try:
                if begin(out, plan):
                    prepare(out, plan, encoder, options, workers or os.cpu_count(), ray)
            finally:
                clean(out)
    except BlockingIOError:
        raise ValueError(f"{out}: another prepare.py is at work there") from None
    report(out, read_or_empty(os.path.join(out, "meta.json")))


if __name__ == "__main__":
    from cli import run_cli

    run_cli(main)
