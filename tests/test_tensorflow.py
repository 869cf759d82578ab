"""model_files/convert.py: OpenAI's TensorFlow checkpoints, which TensorFlow itself writes here."""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import tensorflow_checkpoint
from conftest import REPO, random_params, slow
from test_utils import HPARAMS, assert_same, leaves, load, refusal

from encoder import Encoder
from model_files import convert


@contextlib.contextmanager
def tensorflow():
    """Calls functions in a process with TensorFlow, whose memory goes when it ends."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(**sizes) -> (a folder with a checkpoint as OpenAI's, its parameters)."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("tensorflow is not installed")

    @functools.cache
    def write(**sizes):
        hparams, folder = HPARAMS | sizes, tmp_path_factory.mktemp("tensorflow") / "tf"
        params = random_params(np.random.default_rng(), hparams)
        with tensorflow() as call:
            call(tensorflow_checkpoint.write, folder, leaves(params, hparams))
        (folder / "hparams.json").write_text(json.dumps(hparams))
        encoder = Encoder([])
        (folder / "encoder.json").write_text(json.dumps(encoder.vocab))
        (folder / "vocab.bpe").write_text("#version: 0.2\n")
        return folder, params

    return write


@pytest.fixture
def checkpoint(written, tmp_path):
    """What `written` answers, with a copy in tmp_path / "tf"."""

    def copy(**sizes):
        folder, params = written(**sizes)
        return shutil.copytree(folder, tmp_path / "tf"), params

    return copy


SIZES_OF_1 = [{"n_ctx": 1}, {"n_embd": 1, "n_head": 1, "n_layer": 1}]


@pytest.mark.parametrize("ones", [{}, *map(slow, SIZES_OF_1)], ids=str)
def test_a_tensorflow_checkpoint_loads_and_is_converted_once(checkpoint, ones):
    folder, params = checkpoint(**ones)
    hparams = HPARAMS | ones
    _, found, loaded = load(folder)
    assert found == hparams
    assert_same(loaded, params, hparams)
    assert "model.safetensors" in os.listdir(folder)
    assert not any(name.endswith(".tmp") for name in os.listdir(folder))
    for name in os.listdir(folder):
        if name.startswith(("model.ckpt", "checkpoint")):
            os.unlink(folder / name)
    code = f"""if True:
        import sys
        sys.modules["tensorflow"] = None  # importing it is an error now
        import utils
        print(utils.load_encoder_hparams_and_params({str(folder)!r}, "models")[2]["wte"].sum())
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(float(params["wte"].sum()), rel=1e-4)
    assert_same(load(folder)[2], params, hparams)


def test_gpt_2_simples_checkpoints_load(written, tmp_path):
    """checkpoint/run1 has model-1000.* and model-2000.*, and `checkpoint` names the latest."""
    openai, old = written()
    folder = tmp_path / "checkpoint" / "run1"
    folder.mkdir(parents=True)
    for name in ("hparams.json", "encoder.json", "vocab.bpe"):
        shutil.copy(openai / name, folder)
    new = random_params(np.random.default_rng(), HPARAMS)
    with tensorflow() as call:
        for step, params in (1000, old), (2000, new):
            arrays = leaves(params, HPARAMS)
            call(tensorflow_checkpoint.write, folder, arrays, "model", step)
            assert call(tensorflow_checkpoint.latest, folder) == str(folder / f"model-{step}")
            for _ in range(2):  # the second time, the converted file is read
                assert_same(load(folder)[2], params, HPARAMS)
            assert (folder / f"model-{step}.safetensors").exists()
    (folder / "checkpoint").write_text('model_checkpoint_path: "/content/run1/model-1000"\n')
    assert_same(load(folder)[2], old, HPARAMS)
    for text in ("", "nonsense", 'model_checkpoint_path: "../../model-1000"', "model-2000"):
        (folder / "checkpoint").write_text(text)
        if "1000" in text:
            assert_same(load(folder)[2], old, HPARAMS)
        else:
            assert "no weights" in refusal(folder, FileNotFoundError)


@pytest.mark.slow
def test_a_conversion_is_quiet_and_alike_in_two_processes(checkpoint):
    folder, params = checkpoint()
    code = f"import utils; utils.load_encoder_hparams_and_params({str(folder)!r}, 'models')"
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": REPO}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert [(*p.communicate(timeout=60), p.returncode) for p in processes] == [(b"", b"", 0)] * 2
    assert_same(load(folder)[2], params, HPARAMS)


def test_a_checkpoint_that_is_not_as_hparams_say_is_refused_unconverted(checkpoint):
    folder, _ = checkpoint()

    def refused(**change):
        with pytest.raises(ValueError, match="model.ckpt(: | is unreadable: )") as caught:
            call(convert.read_checkpoint, str(folder / "model.ckpt"), HPARAMS | change)
        assert "\n" not in str(caught.value)

    data = folder / "model.ckpt.data-00000-of-00001"
    whole = data.read_bytes()
    with tensorflow() as call:
        for change in ({"n_layer": 1}, {"n_layer": 3}, {"n_embd": 16}, {"n_vocab": 258}):
            refused(**change)
        refused(n_ctx=8)
        data.write_bytes(whole[: len(whole) // 2])
        refused()
        os.unlink(data)
        refused()
        data.write_bytes(whole)
        (folder / "model.ckpt.index").write_bytes(b"nonsense")
        refused()
    assert "model.ckpt is unreadable: " in refusal(folder)


@pytest.mark.slow
def test_a_checkpoint_whose_conversion_cannot_be_kept_loads_with_a_notice(
    checkpoint, monkeypatch, capsys
):
    folder, params = checkpoint()
    (folder / "model.safetensors").mkdir()  # root, as which tests may run, writes anywhere
    there = sorted(os.listdir(folder))
    assert_same(load(folder)[2], params, HPARAMS)
    assert capsys.readouterr().err == ""  # no terminal, no notice
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert_same(load(folder)[2], params, HPARAMS)
    notice = capsys.readouterr().err
    assert notice.startswith("notice: ") and notice.endswith("Is a directory\n")
    assert sorted(os.listdir(folder)) == there


def masked_crc32c(data):  # of the blocks of TensorFlow's index, a LevelDB table
    crc = 2**32 - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 2**32 - 1
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_a_damaged_checkpoint_that_makes_tensorflow_abort_is_a_line(checkpoint):
    """Found by fuzzing: an entry that does not parse, in a block whose checksum is right."""
    folder, _ = checkpoint()
    path = folder / "model.ckpt.index"
    index = bytearray(path.read_bytes())
    end = next(
        n
        for n in range(len(index) - 52)
        if int.from_bytes(index[n : n + 4], "little") == masked_crc32c(index[:n])
    )
    index[index.index(b"( 5", 10)] = 1  # the tag before a size of 32 bytes
    index[end : end + 4] = masked_crc32c(index[:end]).to_bytes(4, "little")
    path.write_bytes(index)
    assert refusal(folder).endswith("TensorFlow's reader died of SIGABRT")
