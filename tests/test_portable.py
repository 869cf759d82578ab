"""Other systems: every command where what Windows or macOS lacks is missing, see imitation.py."""

import functools
import hashlib
import http.server
import json
import ntpath
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest
from conftest import REPO, TINY, on_linux, slow

import utils
from encoder import Encoder, get_encoder
from gpt2 import generate
from model_files import convert, hub
from training.flags import read_tasks

pytestmark = on_linux
TEXT = "It was the best of times, it was the worst of times, naïve café. " * 60
COMMANDS = sorted(
    path.name for path in REPO.glob("*.py") if "run_cli(main)" in path.read_text("utf-8")
)


@pytest.fixture
def imitated(tmp_path, models):
    """imitated("win32", "gpt2.py", ...) -> what it printed; in tmp_path, with a model, a text."""
    (tmp_path / "text.txt").write_bytes(TEXT.replace(". ", ".\r\n").encode())
    (tmp_path / "sitecustomize.py").write_text(  # for the processes that a command starts
        "import os, sys\n"
        "if '--multiprocessing-fork' in sys.orig_argv:\n"
        f"    sys.path.insert(0, {str(REPO / 'tests')!r})\n"
        "    import imitation\n"
        "    imitation.imitate(os.environ['SYSTEM'], '')\n"
    )
    encoder, hparams, params = utils.load_encoder_hparams_and_params("tiny", str(models[0]))
    utils.save_model(tmp_path / "models" / "tiny", encoder, hparams, params)

    def run(system, script, *words, code=0, input=b"", **options):
        done = subprocess.run(
            command(system, script, *words), cwd=tmp_path, env=environment(system, tmp_path),
            capture_output=True, timeout=120, input=input, **options,
        )  # fmt: skip
        printed, complaint = done.stdout.decode(), done.stderr.decode()
        assert done.returncode == code, complaint
        assert "Traceback" not in complaint
        return (printed if code == 0 else complaint).replace("\r\n", "\n")

    return run


def command(system, script, *words):
    ignored = ["-W", "ignore::EncodingWarning"]  # libraries'; ours are errors
    return [sys.executable, *ignored, REPO / "tests" / "imitation.py", system, script, *words]


def environment(system, folder):
    return os.environ | {
        "SYSTEM": system,
        "PYTHONPATH": str(folder),
        "PYTHONIOENCODING": "cp1252",
        "PYTHONUTF8": "0",
        "PYTHONWARNDEFAULTENCODING": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    }


@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_starts(imitated, script):
    assert "SYNOPSIS" in imitated("win32", script, "--help")


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_text_is_written(imitated, models, system):
    encoder = Encoder([])
    ids = encoder.encode("Zoë")
    wanted = encoder.decode(generate(ids, models[1], TINY["n_head"], 12)).replace("\r\n", "\n")
    flags = ["-n", "12", "--model_size", "tiny"]
    for script in ("gpt2.py", "gpt2_pico.py", "kv_cache.py"):
        assert imitated(system, script, "Zoë", *flags) == wanted + "\n"
    lines = imitated(
        system,
        "kv_cache.py",
        "--prompts_file",
        "-",
        "--jsonl",
        *flags,
        input="Zoë\r\nZ\r\n".encode(),
    ).splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows] == ["Zoë", "Z"] and rows[0]["ids"]
    typed = "Zoë\r\n".encode()
    assert imitated(system, "kv_cache.py", "--interactive", *flags, input=typed) == wanted + "\n"


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_texts_are_read_and_measured(imitated, tmp_path, system):
    measured = imitated(system, "evaluate.py", "perplexity", "--data", "text.txt", "-m", "tiny")
    assert json.loads(measured)["nats_per_token"] > 0
    assert "Open it in a browser" in imitated(system, "explain.py", "Zoë", "-m", "tiny")
    for i in range(4):
        (tmp_path / f"{i}.txt").write_bytes((TEXT * 20).encode())
    words = [f"{i}.txt" for i in range(4)]
    flags = ["--workers", "2", "--shard_mb", "0.05", "--train_tokenizer", "260"]
    there = imitated(system, "prepare.py", *words, "--out", "shards", *flags)
    assert "260 ids" in there
    assert imitated(system, "prepare.py", *words, "--out", "shards", *flags) == there
    assert get_encoder("", tmp_path / "shards").n_vocab == 260


SMALL = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--n_ctx", "16", "--n_warmup", "1"]


@pytest.mark.parametrize(
    "system, script",
    [("win32", "backprop.py"), slow("win32", "train_jax.py")]
    + [slow("darwin", "backprop.py"), slow("darwin", "train_jax.py")],
)
def test_a_run_trains_goes_on_and_replaces_what_it_started_from(imitated, tmp_path, system, script):
    """Its files are mapped or open while others take their places."""
    flags = ["--data", "text.txt", "--n_steps", "4", "--checkpoint_every", "2"]
    imitated(system, script, *flags, *SMALL, "--out", "new")
    assert (tmp_path / "models" / "new" / "loss.png").exists()
    assert "step 8:" in imitated(system, script, "--resume", "new", "--n_steps", "8")
    assert sorted(os.listdir(tmp_path / "models" / "new" / "checkpoints")) == [
        "00000006",
        "00000008",
    ]
    flags += ["--init_from", "new", "--overwrite", "--learning_rate", "0.01"]
    assert "step 4:" in imitated(system, script, *flags, "--out", "new")
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


@pytest.mark.slow
def test_an_adapter_trains_and_is_merged(imitated):
    flags = ["--data", "text.txt", "--n_steps", "2", "--init_from", "tiny", "--lora_rank", "2"]
    imitated("win32", "train_jax.py", *flags, "--out", "models/adapter")
    imitated("win32", "train_jax.py", "--resume", "adapter", "--n_steps", "4")
    assert "is in models/merged" in imitated(
        "win32", "utils.py", "merge", "adapter", "models/merged"
    )
    assert imitated("win32", "gpt2.py", "Z", "-n", "3", "-m", "merged")


def test_a_model_in_use_by_another_program_is_one_line(imitated, tmp_path):
    """As with any editor or indexer of Windows that has the file open."""
    target = tmp_path / "models" / "target"
    encoder, hparams, params = utils.load_encoder_hparams_and_params(
        "tiny", str(tmp_path / "models")
    )
    utils.save_model(target, encoder, hparams, params)
    with open(target / "model.safetensors", "rb") as file:
        os.set_inheritable(file.fileno(), True)  # open in that process, for all that it can see
        flags = ["--data", "text.txt", "--n_steps", "2", "--out", "models/target", "--overwrite"]
        complaint = imitated(
            "win32", "backprop.py", *flags, *SMALL, code=2, pass_fds=[file.fileno()]
        )
    last = complaint.splitlines()[-1]
    assert last.startswith("error: cannot write models/target") and "in use" in last


def test_the_server_serves(imitated, tmp_path):
    words = "serve.py", "-m", "tiny", "--port", "0"
    process = subprocess.Popen(
        command("win32", *words), cwd=tmp_path, env=environment("win32", tmp_path),
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        url = re.search(rb"http://\S+", process.stdout.readline())[0].decode()
        asked = json.dumps({"prompt": "Zo\u00eb", "max_tokens": 5, "temperature": 0}).encode()
        with urllib.request.urlopen(f"{url}/v1/completions", asked, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 5
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, 130)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


DOWNLOAD = """
import sys
sys.path[:0] = [{repo!r}, {repo!r} + "/tests"]
import imitation
imitation.imitate("win32", "")
from model_files import download
download.BACKOFF = 0.001
for sha256 in sys.argv[2:]:
    try:
        download.download_file(sys.argv[1], "new/file", sha256)
        print(open("new/file", "rb").read())
    except ConnectionError as error:
        print(error)
"""


def test_a_download_gets_its_name(tmp_path):
    """The part is open while it arrives, and renamed then; a wrong one is deleted."""
    data = secrets.token_bytes(40)
    (tmp_path / "data").write_bytes(data)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/data"
        words = [DOWNLOAD.format(repo=str(REPO)), url, "0" * 64, hashlib.sha256(data).hexdigest()]
        done = subprocess.run(
            [sys.executable, "-c", *words],
            cwd=tmp_path, env=environment("win32", tmp_path) | {"NO_PROXY": "127.0.0.1"},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        server.shutdown()
    assert done.returncode == 0, done.stderr
    wrong, whole = done.stdout.splitlines()
    assert "does not match its checksum" in wrong and whole == repr(data)
    assert os.listdir(tmp_path / "new") == ["file"]


# --- Paths and lines ------------------------------------------------------------------------------


class WindowsPaths:
    """os, with Windows's rules for paths."""

    path = ntpath

    def __getattr__(self, name):
        return getattr(os, name)


@pytest.mark.parametrize("name", [r"C:\models\mine", r"models\mine", r"..\mine", "C:/models/mine"])
def test_drive_letters_and_backslashes_are_paths(monkeypatch, name):
    monkeypatch.setattr(utils, "os", WindowsPaths())
    monkeypatch.setattr(hub, "os", WindowsPaths())
    assert not hub.is_repository(name)
    with pytest.raises(ValueError, match="no folder at .*; give a model's folder, or its name"):
        utils.find_model(name)
    assert utils.target_dir(name) == name and utils.target_dir("mine") == r"models\mine"
    assert read_tasks(f"hellaswag={name}.jsonl,lambada") == {
        "hellaswag": f"{name}.jsonl",
        "lambada": None,
    }


def test_a_tokenizer_with_windows_line_ends_is_the_same(tmp_path):
    encoder = get_encoder("shakespeare", REPO / "models")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        data = (REPO / "models" / "shakespeare" / name).read_bytes()
        (tmp_path / name).write_bytes(data.replace(b"\n", b"\r\n"))
    learned = Encoder([("a", "b"), ("ab", "c")])
    learned.save(tmp_path / "learned")
    for name in os.listdir(tmp_path / "learned"):
        data = (tmp_path / "learned" / name).read_bytes()
        (tmp_path / "learned" / name).write_bytes(data.replace(b"\n", b"\r\n"))
    for folder, wanted in ((tmp_path, encoder), (tmp_path / "learned", learned)):
        found = get_encoder("", folder)
        assert found.vocab == wanted.vocab
        assert found.encode("abc, naïve\n") == wanted.encode("abc, naïve\n")


def test_how_tensorflows_reader_ends_without_signals():
    assert [convert.how_it_died(code) for code in (0, 1, 2)] == ["", "", ""]
    assert convert.how_it_died(-signal.SIGABRT) == "SIGABRT"
    assert convert.how_it_died(0xC0000409) == "exit code 3221226505"
