"""corpus/shards.py: prepare.py's folders, nanoGPT's, llm.c's; whole or broken; and models."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, call, call_trainer, run

from corpus import shards
from encoder import ENDOFTEXT, Encoder, get_encoder
from evaluate import load_shards
from training.text import load_tokens


def write_nano(path, ids):
    """As nanoGPT's data/*/prepare.py: a flat file of uint16."""
    np.array(ids, dtype=np.uint16).tofile(path)


def write_llm_c(path, ids, version=1, magic=20240520, dtype=np.uint16):
    """As llm.c's dev/data/data_common.py: 256 int32, then GPT-2's uint16 or Llama 3's uint32."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(ids)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.array(ids, dtype=dtype).tobytes())


SIZES = ["--n_layer", "1", "--n_embd", "16", "--n_ctx", "32"]
TRAIN = [*SIZES, "--n_steps", "40", "--eval_every", "20"]
LLAMA_3 = {"magic": 20240801, "version": 7, "dtype": np.uint32}


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("prepared")
    text = f"\n{ENDOFTEXT}\n".join(f"story {i} of an old man" * 9 for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    flags = ["--out", "s", "--shard_mb", "0.004", "--val_fraction", "0.2"]
    assert run("prepare.py", "a.txt", *flags, cwd=tmp_path)[0] == 0
    return tmp_path / "s"


@pytest.fixture
def prepared(prepared_once, tmp_path):
    """A folder of prepare.py's with several shards."""
    return shutil.copytree(prepared_once, tmp_path / "s")


def test_prepared_shards_are_mapped(prepared):
    split, encoder = shards.open_shards(prepared)
    assert encoder.merges == [] and len(split["train"]) > 3
    for name, arrays in split.items():
        for array, path in zip(arrays, sorted(prepared.glob(f"{name}_*.bin")), strict=True):
            assert isinstance(array, np.memmap) and not array.flags.writeable
            assert array.tolist() == np.fromfile(path, "<u2").tolist()


def test_sequences_run_across_shards(rng):
    parts = [np.array(rng.integers(0, 9, n), np.uint16) for n in (5, 1, 1, 30, 2)]
    whole = np.concatenate(parts)
    assert shards.count_ids(parts) == len(whole)
    for start in range(len(whole)):
        for n in range(1, len(whole) - start + 1):
            sequence = shards.read_sequences(parts, [start], n)[0]
            assert sequence.tolist() == whole[start : start + n].tolist()
            assert sequence.dtype == np.int32


@pytest.mark.parametrize("kind", ["nanoGPT", "llm.c"])
def test_foreign_shards(tmp_path, rng, kind):
    train, val = rng.integers(0, 257, 1000).tolist(), rng.integers(0, 257, 300).tolist()
    if kind == "nanoGPT":
        write_nano(tmp_path / "train.bin", train)
        write_nano(tmp_path / "val.bin", val)
        (tmp_path / "meta.pkl").write_bytes(b"never read")
    else:
        write_llm_c(tmp_path / "fineweb_train_000001.bin", train[:600])
        write_llm_c(tmp_path / "fineweb_train_000002.bin", train[600:])
        write_llm_c(tmp_path / "fineweb_val_000000.bin", val)
    split, encoder = shards.open_shards(tmp_path)
    assert encoder is None
    assert shards.read_sequences(split["train"], [0], 1000).tolist() == [train]
    assert shards.read_sequences(split["val"], [0], 300).tolist() == [val]
    Encoder([("a", "b")]).save(tmp_path)
    assert shards.open_shards(tmp_path)[1].merges == [("a", "b")]


def test_llama_3s_shards_hold_ids_beyond_uint16(tmp_path, rng):
    ids = [128000, *rng.integers(0, 128256, 300).tolist()]
    write_llm_c(tmp_path / "edu_fineweb_train_000001.bin", ids, **LLAMA_3)
    write_llm_c(tmp_path / "edu_fineweb_val_000000.bin", ids[::-1], **LLAMA_3)
    split, _ = shards.open_shards(tmp_path)
    assert [split[name][0].tolist() for name in ("train", "val")] == [ids, ids[::-1]]
    write_llm_c(tmp_path / "edu_fineweb_val_000000.bin", ids, **LLAMA_3 | {"dtype": np.uint64})
    with pytest.raises(ValueError, match="its header says version 7, 301 ids"):
        shards.open_shards(tmp_path)


def put_id(path, position, id):
    ids = np.memmap(path, "<u2", mode="r+")
    ids[position] = id
    ids.flush()


def test_an_id_beyond_the_vocabulary_is_found_where_it_is(prepared, tmp_path, rng):
    n_ids = (prepared / "train_000001.bin").stat().st_size // 2
    position = int(rng.integers(n_ids))
    put_id(prepared / "train_000001.bin", position, 60000)
    problem = rf"train_000001.bin: id 60000 at position {position}, but the tokenizer has only 257"
    with pytest.raises(ValueError, match=problem):
        load_tokens(str(prepared))
    for train in (functools.partial(call, "backprop.py"), call_trainer):
        code, out, err = train("--data", prepared, "--out", tmp_path / "m", *TRAIN)
        assert (code, out) == (2, "") and re.search(problem, err) and err.count("\n") == 1
    assert not (tmp_path / "m").exists()
    load_shards(str(prepared), Encoder([]))  # evaluate.py reads only the other split
    put_id(prepared / "val_000000.bin", 3, 257)
    with pytest.raises(ValueError, match="val_000000.bin: id 257 at position 3, but the tokenizer"):
        load_shards(str(prepared), Encoder([]))


def test_ids_are_checked_in_every_part_and_below_zero(tmp_path):
    ids = np.zeros(2**21, "<i8")
    for position, id in ((2**20 - 1, -1), (2**20, 256), (2**21 - 1, 2**40)):
        ids[position] = id
        ids.tofile(tmp_path / "train.bin")
        shard = np.memmap(tmp_path / "train.bin", "<i8", mode="r")
        with pytest.raises(ValueError, match=f"train.bin: id {id} at position {position}, but"):
            shards.check_ids([shard], 256)
        ids[position] = 255
    ids.tofile(tmp_path / "train.bin")
    shards.check_ids([np.memmap(tmp_path / "train.bin", "<i8", mode="r")], 256)


def damage(folder, how):
    meta = json.loads((folder / "meta.json").read_text())
    if how == "cut":
        data = (folder / "train_000001.bin").read_bytes()
        (folder / "train_000001.bin").write_bytes(data[:-2])
    elif how == "gone":
        (folder / "train_000001.bin").unlink()
    elif how == "no meta":
        (folder / "meta.json").unlink()
    elif how == "other":
        (folder / "meta.json").write_text("[1]")
    elif how == "huge":
        with open(folder / "meta.json", "ab") as file:
            file.truncate(2**40)  # a hole, which takes no room
    elif how in ("pipe", "zero", "loop", "is a folder"):
        name = "meta.json" if how != "loop" else "train_000001.bin"
        (folder / name).unlink()
        if how == "pipe":
            os.mkfifo(folder / name)
        elif how == "is a folder":
            (folder / name).mkdir()
        else:
            (folder / name).symlink_to("/dev/zero" if how == "zero" else name)
    elif how == "odd":
        with open(folder / "train_000001.bin", "ab") as file:
            file.write(b"x")
    elif how == "deep":
        (folder / "meta.json").write_text("[" * 200_000)
    elif isinstance(how, dict):
        (folder / "meta.json").write_text(json.dumps(meta | how))


@pytest.mark.parametrize(
    "how, problem",
    [
        ("cut", r"train_000001.bin: \d+ bytes, but meta.json has \d+ ids"),
        ("gone", r"train_000001.bin"),
        ("odd", r"train_000001.bin: \d+ bytes, but meta.json has \d+ ids"),
        ("pipe", "meta.json: not an ordinary file"),
        ("zero", "meta.json: not an ordinary file"),
        ("is a folder", "meta.json: not an ordinary file"),
        ("huge", f"meta.json: {2**40} bytes, more than"),
        ("loop", "Too many levels of symbolic links: .*train_000001.bin"),
        ("no meta", r"no meta.json; prepare.py has not finished there, so run it again"),
        ("other", r"meta.json: not a JSON object"),
        ("deep", r"meta.json: not JSON"),
        *(
            ({"dtype": d}, "meta.json: not written by prepare.py")
            for d in ("float16", ["uint16"], None)
        ),
        *(
            ({"shards": s}, "meta.json: not written by prepare.py")
            for s in (None, ["train_000000.bin"])
        ),
        *(
            ({"shards": {name: n}}, "meta.json: .* is not a shard")
            for name in (
                "train_000000.bin",
                "../train_000000.bin",
                "/etc/passwd",
                "x_000000.bin",
                "",
            )
            for n in (
                (0, -1, 1.5, True, "9", None, 1e400, float("nan"), [[1]])
                if name.startswith("train")
                else (9,)
            )
        ),
    ],
    ids=str,
)
def test_damaged_folders(prepared, how, problem):
    damage(prepared, how)
    with pytest.raises((ValueError, OSError), match=problem):
        shards.open_shards(prepared)


def test_a_shard_of_more_ids_than_numbers_have_bits(prepared):
    for n_ids in (2**31, 2**63, 2**64, 10**400):
        damage(prepared, {"shards": {"train_000000.bin": n_ids}})
        with pytest.raises(ValueError, match="train_000000.bin: .* bytes, but meta.json has"):
            shards.open_shards(prepared)


def test_damaged_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no token shards; expected prepare.py's meta.json"):
        shards.open_shards(tmp_path)
    for data, problem in (
        (b"", "0 bytes, which cannot"),
        (b"abc", "3 bytes, which cannot be uint16"),
    ):
        (tmp_path / "train.bin").write_bytes(data)
        with pytest.raises(ValueError, match=problem):
            shards.open_shards(tmp_path)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 2**30  # times 2 is more than an int32 holds
    (tmp_path / "train.bin").write_bytes(header.tobytes())
    with pytest.raises(ValueError, match=f"its header says version 1, {2**30} ids"):
        shards.open_shards(tmp_path)
    write_llm_c(tmp_path / "train.bin", range(99), version=7)
    with pytest.raises(ValueError, match="its header says version 7, 99 ids"):
        shards.open_shards(tmp_path)
    write_llm_c(tmp_path / "train.bin", range(99))
    (tmp_path / "train.bin").write_bytes((tmp_path / "train.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match="1220 bytes, but its header says version 1, 99 ids"):
        shards.open_shards(tmp_path)


@pytest.mark.slow
def test_a_model_is_trained_from_shards(prepared, tmp_path):
    code, out, err = call_trainer("--data", prepared, "--out", tmp_path / "m", *TRAIN)
    assert (code, err) == (0, "")
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step")]
    assert len(losses) == 2 and losses[1] < losses[0] < 5.6
    assert get_encoder("m", tmp_path).merges == []
    code, out, err = call(
        "gpt2.py", "story", "--model_size", tmp_path / "m", "--n_tokens_to_generate", "5"
    )
    assert (code, err) == (0, "")


@pytest.mark.slow
def test_the_same_ids_train_alike_from_every_kind(prepared, tmp_path):
    split, encoder = shards.open_shards(prepared)
    train, val = (np.concatenate(split[name]) for name in ("train", "val"))
    for kind, write in (("nano", write_nano), ("llm.c", write_llm_c)):
        (tmp_path / kind).mkdir()
        write(tmp_path / kind / "x_train.bin", train)
        write(tmp_path / kind / "x_val.bin", val)
    encoder.save(tmp_path / "tokenizer")
    printed = []
    for folder in (prepared, tmp_path / "nano", tmp_path / "llm.c"):
        flags = ["--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / f"of {folder.name}"]
        code, out, err = call_trainer("--data", folder, *flags, *TRAIN)
        assert (code, err) == (0, "")
        printed.append([line for line in out.splitlines() if "FLOP" not in line][:3])
    assert printed[0] == printed[1] == printed[2]

    code, out, err = call_trainer("--data", tmp_path / "nano", "--out", tmp_path / "n")
    problem = "these shards have no tokenizer; name theirs with --tokenizer"
    assert (code, out) == (2, "") and problem in err and err.count("\n") == 1
    write_nano(tmp_path / "nano" / "x_val.bin", [1, 300] * 100)
    flags = ["--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "n"]
    code, out, err = call_trainer("--data", tmp_path / "nano", *flags)
    assert (code, out) == (2, "") and "id 300 at position 1, but the tokenizer has only 257" in err


@pytest.mark.slow
def test_a_text_may_have_a_tokenizer(tmp_path):
    Encoder([("t", "h"), ("th", "e")]).save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("the old man and the sea " * 300)
    flags = ["--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "m", *TRAIN]
    code, out, err = call_trainer("--data", tmp_path / "a.txt", *flags)
    assert (code, err) == (0, "")
    n_ids = 300 * (len("the old man and the sea ") - 4)
    assert f", {n_ids * 9 // 10} training" in out
    assert get_encoder("m", tmp_path).n_vocab == 259


def test_the_last_word_of_a_foreign_name_says_which_split_it_is(tmp_path):
    for name in ("retrieval_train_1.bin", "training_val_1.bin", "other.bin"):
        np.arange(5, dtype="<u2").tofile(tmp_path / name)
    found, _ = shards.open_shards(tmp_path)
    names = {split: [Path(shard.filename).name for shard in some] for split, some in found.items()}
    assert names == {"train": ["retrieval_train_1.bin"], "val": ["training_val_1.bin"]}


def test_there_may_be_more_shards_than_open_files(tmp_path):
    for i in range(400):
        np.array([i], "<u2").tofile(tmp_path / f"train{i:03}.bin")
    code = (
        "import sys; from corpus.shards import count_ids, open_shards; "
        "print(count_ids(open_shards(sys.argv[1])[0]['train']))"
    )
    command = f'ulimit -Sn 100 && exec {sys.executable} -c "{code}" {tmp_path}'
    done = subprocess.run(command, shell=True, capture_output=True, cwd=REPO, encoding="utf-8")
    assert (done.stdout, done.stderr) == ("400\n", "")
