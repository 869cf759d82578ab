"""Models by owner/name, from a server on this machine that speaks the Hub's protocol."""

import hashlib
import http.server
import json
import os
import re
import shutil
import sys
import threading
import time

import pytest
from conftest import TINY, call, call_trainer, random_params, run

import utils
from encoder import Encoder
from gpt2 import generate
from model_files.hub import RELEASED

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
from huggingface_hub import constants  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")
API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?(?:/.*)?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves server.repositories, {"owner/name": {file: bytes}}, as https://huggingface.co does.

    Large files are redirected, as the Hub's are; server.faults says what is wrong with a file.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", length=None, **headers):
        self.close_connection = True
        self.send_response(status)
        for key, value in {"Connection": "close", **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.seen.append((self.command, path, self.headers))
        if self.server.status:
            return self.answer(self.server.status)
        found = API.fullmatch(path) or RESOLVE.fullmatch(path.removeprefix("/cdn"))
        files = self.server.repositories.get(found and found[1])
        if files is None:
            return self.answer(401, X_Error_Code="RepoNotFound")
        if found.re is RESOLVE:
            return self.send_file(files, *found.groups()[1:], on_cdn=path.startswith("/cdn/"))
        if found[3] not in (None, "main", COMMIT, "v1"):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if self.server.listing:
            return self.answer(200, self.server.listing, Content_Type="application/json")
        listing = {"id": found[1], "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
        return self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")

    do_HEAD = do_GET

    def send_file(self, files, revision, name, on_cdn):
        data, fault = files.get(name), self.server.faults.get(name, "")
        if fault == "gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if fault == "leads away":
            return self.answer(302, Location=self.server.elsewhere)
        if fault == "names":
            about = {"ETag": '"1"', "X_Repo_Commit": COMMIT}
            return self.answer(200 if data else 404, data or b"", **about | self.server.names)
        if data is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        about = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": COMMIT}
        if name.endswith(LARGE) and not on_cdn:
            about |= {"X_Linked_ETag": about["ETag"], "X_Linked_Size": len(data)}
            return self.answer(302, **about, Location="/cdn" + self.path)
        start = int(re.sub("[^0-9]", "", (self.headers.get("Range") or "0").partition("-")[0]))
        body, status = data[start:], 206 if start else 200
        if start:
            about["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if fault == "lies" and self.command == "GET":
            return self.answer(status, body + b"more", **about)
        if fault == "breaks off" and self.command == "GET":
            self.server.n_breaks -= 1
            if not self.server.n_breaks:
                self.server.faults.pop(name)
            body = body[: len(body) // 2]
        return self.answer(status, body, len(data) - start, **about)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Its url, and a cache of one's own; the environment names both, for other processes, too."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.faults, server.seen, server.status = {}, {}, [], 0
    server.listing, server.names, server.n_breaks = None, {}, 1
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def tiny(models):
    """The files of a small model, and what it continues "It was" with."""
    (folder, params), encoder = models, Encoder([])
    prompt, end = encoder.encode("It was"), encoder.endoftext
    ids = generate(prompt, params, TINY["n_head"], 12, endoftext=end)
    return files_of(folder / "tiny"), encoder.decode(ids) + "\n"


def gpt2(name, *flags):
    return call("gpt2.py", "It was", "-n", "12", "--model_size", name, *flags)


def fetched(server):
    """The files that were asked for, and sent: not only their sizes, nor from where."""
    gets = [path.removeprefix("/cdn") for method, path, _ in server.seen if method == "GET"]
    return [found[3] for found in map(RESOLVE.fullmatch, gets) if found]


def test_a_model_is_fetched_once_and_then_needs_no_network(server, tiny):
    """As a person would: two processes, the second with neither server nor network."""
    files, text = tiny
    server.repositories["some-one/tiny.gpt2"] = files | {"pytorch_model.bin": b"a pickle"}
    command = ["gpt2.py", "It was", "-n", "12", "--model_size", "some-one/tiny.gpt2"]
    assert run(*command) == (0, text, "")
    assert set(fetched(server)) == set(files)
    server.shutdown()
    server.server_close()
    assert run(*command) == (0, text, "")
    assert run(*command, env=os.environ | {"HF_HUB_OFFLINE": "1"}) == (0, text, "")


def shard(files):
    """The same tensors in two files and an index."""
    from safetensors.numpy import load, save

    tensors = load(files["model.safetensors"])
    names = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    where = {key: names[len(key) % 2] for key in tensors}
    parts = {n: save({k: tensors[k] for k in where if where[k] == n}) for n in names}
    index = json.dumps({"weight_map": where}).encode()
    others = {name: data for name, data in files.items() if name != "model.safetensors"}
    return others | parts | {"model.safetensors.index.json": index}


@pytest.mark.parametrize("name", ["some/shards", "some/shards@v1", f"some/shards@{COMMIT}"])
def test_shards_and_revisions(server, tiny, name):
    server.repositories["some/shards"] = shard(tiny[0])
    assert gpt2(name) == (0, tiny[1], "")
    server.repositories = {}
    assert gpt2(name) == (0, tiny[1], "")
    assert gpt2("some/shards@v2")[0] == 2


def test_every_small_file_that_is_read_is_fetched(server, tiny, rng, tmp_path):
    """A folder and its copy on the Hub give the same ids, and end at the same one."""
    sizes = TINY | {"n_vocab": 260}
    utils.save_model(tmp_path / "m", Encoder([]), sizes, random_params(rng, sizes))
    for name, content in {
        "added_tokens.json": {"<|pad|>": 257, "</s>": 258, "covid": 259},
        "special_tokens_map.json": {"pad_token": "<|pad|>", "eos_token": "</s>"},
        "generation_config.json": {"eos_token_id": [258, 10]},
    }.items():
        (tmp_path / "m" / name).write_text(json.dumps(content))
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages }}")
    server.repositories["some/added"] = files_of(tmp_path / "m")
    encoders = [
        utils.load_encoder_hparams_and_params(name)[0]
        for name in (str(tmp_path / "m"), "some/added")
    ]
    assert set(fetched(server)) == set(server.repositories["some/added"])
    for encoder in encoders:
        assert encoder.end_ids == (258, 10) and encoder.chat_template == "{{ messages }}"
        assert encoder.encode("a covid<|pad|>", allow_endoftext=True) == [64, 220, 259, 257]
    assert encoders[0].added == encoders[1].added


def test_a_folder_wins(server, tiny, tmp_path):
    server.repositories["some/tiny"] = {}
    for path in ("models/some/tiny", "some/tiny"):
        (tmp_path / path).mkdir(parents=True)
        for name, data in tiny[0].items():
            (tmp_path / path / name).write_bytes(data)
        assert gpt2("some/tiny") == (0, tiny[1], "") and not server.seen
        shutil.rmtree(tmp_path / "models", ignore_errors=True)
    (tmp_path / "models").mkdir()
    code, _, complaint = gpt2("models/tinny")
    assert code == 2 and complaint.startswith("error: no folder at models/tinny; give a model's")
    assert not server.seen


def test_every_script_takes_a_name(server, tiny, tmp_path):
    server.repositories["some/tiny"] = tiny[0]
    (tmp_path / "text.txt").write_text("It was the best of times. " * 60)
    name = ["--model_size", "some/tiny"]
    code, text, _ = call("kv_cache.py", "It was", "-n", "12", *name)
    assert (code, text) == (0, tiny[1])
    code, out, _ = call("evaluate.py", "perplexity", "--data", "text.txt", *name)
    assert code == 0 and json.loads(out)["nats_per_token"] > 0
    assert call("explain.py", "It was", "--out", "page.html", *name)[0] == 0
    tokenizer = ["--tokenizer", "some/tiny", "--out", "shards"]
    assert call("prepare.py", "text.txt", *tokenizer)[0] == 0
    assert fetched(server).count("model.safetensors") == 1


@pytest.mark.slow
def test_training_goes_on_with_a_model_of_the_hub(server, tiny, tmp_path):
    server.repositories["some/tiny"] = tiny[0]
    (tmp_path / "text.txt").write_text("It was the best of times. " * 60)
    flags = ["--init_from", "some/tiny", "--n_steps", "1", "--out", "./mine", "--n_ctx", "16"]
    assert call_trainer("--data", "text.txt", *flags)[0] == 0
    assert gpt2("mine", "--models_dir", ".")[0] == 0


@pytest.fixture
def no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it is an error now


@pytest.mark.parametrize("size", RELEASED)
def test_a_released_size_needs_no_tensorflow(server, tiny, no_tensorflow, size):
    """The Hub has the same weights as safetensors; nothing of OpenAI's is asked for."""
    server.repositories[RELEASED[size]] = tiny[0]
    assert gpt2(size) == (0, tiny[1], "")
    assert call("gpt2_pico.py", "It was", "-n", "12", "--model_size", size) == (0, tiny[1], "")
    assert fetched(server).count("model.safetensors") == 1


def test_what_is_read_instead_of_the_checkpoint_is_said_once(
    server, tiny, no_tensorflow, monkeypatch, capsys
):
    server.repositories["openai-community/gpt2"] = tiny[0]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    utils.find_model("gpt2-small")
    assert capsys.readouterr().err.startswith(
        "notice: TensorFlow is not installed, so 124M is downloaded from the Hugging Face Hub, "
        "openai-community/gpt2"
    )
    utils.find_model("gpt2-small")
    assert capsys.readouterr().err == ""


def test_a_checkpoint_that_waits_for_tensorflow_is_left_alone(
    server, tiny, no_tensorflow, tmp_path
):
    """Converted weights are read where they are; before that the Hub's are."""
    server.repositories["openai-community/gpt2"] = tiny[0]
    folder = tmp_path / "models" / "124M"
    folder.mkdir(parents=True)
    for name in ("hparams.json", "encoder.json", "vocab.bpe", "model.ckpt.index"):
        (folder / name).write_text("{}")
    assert gpt2("124M") == (0, tiny[1], "")
    assert utils.find_model("124M", only_tokenizer=True) == str(folder)
    server.repositories.clear()
    for name in ("encoder.json", "vocab.bpe"):
        (folder / name).unlink()
    for name, data in tiny[0].items():
        (folder / name).write_bytes(data)
    assert gpt2("124M") == (0, tiny[1], "")


def test_openais_own_checkpoint_can_be_asked_for(server, tiny, monkeypatch, tmp_path):
    sizes = []
    monkeypatch.setattr(utils, "download", lambda size, *_: sizes.append(size))
    monkeypatch.setattr(utils, "has_tensorflow", lambda: False)
    server.repositories["openai-community/gpt2"] = tiny[0]
    code, out, complaint = gpt2("openai:124M")
    assert (code, out, complaint.count("\n")) == (2, "", 1)
    words = "error: openai:124M: reading it for the first time needs tensorflow: pip inst"
    assert complaint.startswith(words)
    assert complaint.endswith("; or use 124M, the same weights from the Hub\n")
    assert sizes == [] and server.seen == []
    monkeypatch.setattr(utils, "has_tensorflow", lambda: True)
    for name in ("openai:124M", "124M", "gpt2-small"):
        assert utils.find_model(name, str(tmp_path)) == str(tmp_path / "124M")
    assert sizes == ["124M"] * 3 and server.seen == []
    with pytest.raises(ValueError, match="no model 'openai:9M'"):
        utils.find_model("openai:9M")


def test_without_tensorflow_and_network_one_line_names_the_model_that_needs_none(
    server, no_tensorflow
):
    server.shutdown()
    server.server_close()
    code, out, complaint = gpt2("124M")
    assert (code, out, complaint.count("\n")) == (2, "", 1)
    assert complaint.startswith("error: 124M, without TensorFlow: no folder at openai-community/")
    assert complaint.endswith("; --model_size shakespeare needs no network\n")


def test_a_short_name_suggests_the_models_own(server):
    for name in ("distilgpt2", "distilgpt"):
        with pytest.raises(ValueError, match=f"{name}': did you mean distilbert/distilgpt2"):
            utils.find_model(name)


def test_a_tokenizer_alone(server, tiny):
    server.repositories["some/tiny"] = tiny[0]
    folder = utils.find_model("some/tiny", only_tokenizer=True)
    assert "vocab.json" in os.listdir(folder) and "model.safetensors" not in fetched(server)
    assert gpt2("some/tiny") == (0, tiny[1], "")  # what is there is not taken for the whole


def test_an_adapter_is_fetched_without_a_model(server):
    server.repositories["some/lora"] = {"adapter_config.json": b"{}", "README.md": b""}
    with pytest.raises(ValueError, match="some/lora has no adapter_model.safetensors"):
        utils.find_model("some/lora")
    server.repositories["some/lora"]["adapter_model.safetensors"] = b"x"
    folder = utils.find_model("some/lora")
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert utils.find_model(f"some/lora@{COMMIT}") == folder


def changed(files, **settings):
    return files | {"config.json": json.dumps(json.loads(files["config.json"]) | settings).encode()}


def without(files, *names):
    return {name: data for name, data in files.items() if name not in names}


REFUSED = {  # files -> files, and what is said of them
    "llama": (
        lambda f: f | {"config.json": b'{"model_type": "llama", "hidden_size": 9}'},
        "some/one/config.json: model_type 'llama' is not supported; only 'gpt2' is",
    ),
    "relu": (
        lambda f: changed(f, activation_function="relu"),
        "some/one/config.json: activation_function 'relu' is not supported",
    ),
    "no sizes": (
        lambda f: changed(f, n_embd=None),
        "some/one/config.json: n_embd is None, not a sensible number",
    ),
    "pickles": (
        lambda f: without(f, "model.safetensors") | {"pytorch_model.bin": b"x"},
        "some/one has no model.safetensors, and its pickles are not opened",
    ),
    "no weights": (
        lambda f: without(f, "model.safetensors"),
        "some/one has no model.safetensors\n",
    ),
    "a shard is missing": (
        lambda f: without(shard(f), "model-00002-of-00002.safetensors"),
        "some/one has no model-00002-of-00002.safetensors",
    ),
    "an index that leads away": (
        lambda f: shard(f) | {"model.safetensors.index.json": b'{"weight_map": {"a": "../x"}}'},
        "model.safetensors.index.json: weight_map must name files in this folder",
    ),
    "no config": (lambda f: without(f, "config.json"), "some/one is not a model for transformers"),
    "no tokenizer": (
        lambda f: without(without(f, "vocab.json"), "tokenizer.json"),
        "no tokenizer in some/one: expected",
    ),
    "another tokenizer": (
        lambda f: without(f, "vocab.json") | {"tokenizer.json": b'{"model": {"type": "Unigram"}}'},
        "some/one/tokenizer.json: model.type 'Unigram' is not supported",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_opened_is_refused_before_anything_large_is_fetched(server, tiny, why):
    change, words = REFUSED[why]
    server.repositories["some/one"] = change(tiny[0])
    code, out, complaint = gpt2("some/one")
    assert (code, out, complaint.count("\n")) == (2, "", 1) and words in complaint
    assert not any(name.endswith(LARGE) for name in fetched(server))


def test_an_unknown_name_and_an_unknown_revision(server, tiny):
    server.repositories["some/tiny"] = tiny[0]
    for name, words in {
        "some/tinny": f"no folder at some/tinny, and no public model at {server.url}. If it is",
        "some/tiny@v3": "some/tiny has no revision 'v3'",
    }.items():
        code, out, complaint = gpt2(name)
        assert (code, out, complaint.count("\n")) == (2, "", 1)
        assert complaint.startswith(f"error: {words}")


def test_a_gated_model_says_where_to_ask(server, tiny, monkeypatch):
    server.repositories["some/gated"] = tiny[0]
    server.faults["config.json"] = "gated"
    code, _, complaint = gpt2("some/gated")
    assert code == 2 and complaint.count("\n") == 1
    assert f"some/gated is gated; ask for access at {server.url}/some/gated" in complaint
    server.faults.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert gpt2("some/gated") == (0, tiny[1], "")
    assert server.seen[-1][2]["Authorization"] == "Bearer hf_mine"


def test_no_network_and_a_server_in_trouble(server, monkeypatch):
    server.status = 500
    code, _, complaint = gpt2("some/tiny")
    assert code == 2 and complaint.endswith(f"from {server.url} failed: it answered 500\n")
    server.shutdown()
    server.server_close()
    code, _, complaint = gpt2("some/tiny")
    assert code == 2 and complaint.count("\n") == 1
    assert complaint.startswith("error: no folder at some/tiny, and downloading it from http")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, complaint = gpt2("some/tiny")
    assert code == 2 and complaint.count("\n") == 1 and "unset HF_HUB_OFFLINE" in complaint


NONSENSE = {  # what the Hub says of a repository, where it lists its files
    "no JSON": b"<html>",
    "no UTF-8": b'{"\xff',
    "a list": b"[]",
    "files without names": b'{"id": "some/tiny", "siblings": [{}]}',
    "files that are none": b'{"id": "some/tiny", "siblings": [null]}',
    "no id": b'{"siblings": []}',
    "names that lead away": b'{"id": "x", "siblings": [{"rfilename": "../config.json"}]}',
    "a commit that leads away": b'{"id": "x", "sha": "../../../../x", "siblings": [{"rfilename": '
    b'"config.json"}]}',
    "a commit that is a number": b'{"id": "x", "sha": 0.5}',
    "names that are numbers": b'{"id": "some/tiny", "sha": "01", "siblings": [{"rfilename": []}]}',
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_server_that_is_not_the_hub(server, tiny, tmp_path, what):
    server.repositories["some/tiny"], server.listing = tiny[0], NONSENSE[what]
    code, out, complaint = gpt2("some/tiny")
    assert (code, out, complaint.count("\n")) == (2, "", 1) and "some/tiny" in complaint
    assert set(os.listdir(tmp_path)) <= {"cache"}


@pytest.mark.parametrize("status", [403, 404, 429, 503])
def test_a_status_that_is_no_answer(server, status, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library tries again
    server.status = status
    code, out, complaint = gpt2("some/tiny")
    assert (code, out, complaint.count("\n")) == (2, "", 1)
    assert complaint.startswith("error: no folder at some/tiny, and ")


@pytest.mark.parametrize("header", ["ETag", "X_Linked_ETag", "X_Repo_Commit"])
def test_no_file_is_named_after_what_the_hub_says(server, tiny, tmp_path, header):
    """The library would write to any place that is named so, and makes folders on the way."""
    server.repositories["some/tiny"] = tiny[0]
    server.faults["config.json"] = "names"
    before = set(tmp_path.rglob("*"))
    for away in ("../../../../../away/x", str(tmp_path / "away" / "x"), 'W/"../../../../x"'):
        server.names = {header: away}
        code, out, complaint = gpt2("some/tiny")
        assert (code, out, complaint.count("\n")) == (2, "", 1), complaint
        assert complaint.startswith("error: no folder at some/tiny, and downloading it from ")
        made = set(tmp_path.rglob("*")) - before
        assert all(path.is_relative_to(tmp_path / "cache") for path in made)
        assert not any(path.name.startswith("x") for path in made)
    server.names = {header: 'W/"as-usual"'} if header == "ETag" else {}
    assert gpt2("some/tiny") == (0, tiny[1], "")


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/x", "ftp://x", "http://[/"])
def test_a_redirection_to_elsewhere(server, tiny, place):
    """Of a small file: nothing is taken from there."""
    server.repositories["some/tiny"] = tiny[0]
    server.faults["config.json"] = "leads away"
    server.elsewhere = place
    code, out, complaint = gpt2("some/tiny")
    assert (code, out, complaint.count("\n")) == (2, "", 1), complaint
    assert complaint.startswith("error: no folder at some/tiny, and downloading it from ")


def test_a_line_that_breaks_off_is_taken_up_again(server, tiny, monkeypatch):
    server.repositories["some/tiny"] = tiny[0]
    server.faults["model.safetensors"] = "breaks off"
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is lost, at most
    assert gpt2("some/tiny") == (0, tiny[1], "")
    asked = [headers["Range"] for _, path, headers in server.seen if path.endswith(".safetensors")]
    assert asked[-1] == f"bytes={len(tiny[0]['model.safetensors']) // 2 // 1000 * 1000}-"


def test_a_line_that_always_breaks_off(server, tiny, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library tries again
    server.repositories["some/tiny"] = tiny[0]
    server.faults["model.safetensors"], server.n_breaks = "breaks off", 1000
    code, out, complaint = gpt2("some/tiny")
    assert (code, out, complaint.count("\n")) == (2, "", 1)
    assert complaint.startswith("error: no folder at some/tiny, and downloading it from ")
    server.faults.clear()
    assert gpt2("some/tiny") == (0, tiny[1], "")


def test_a_server_that_lies_about_a_size(server, tiny):
    server.repositories["some/tiny"] = tiny[0]
    server.faults["model.safetensors"] = "lies"
    code, out, complaint = gpt2("some/tiny")
    assert (code, out, complaint.count("\n")) == (2, "", 1)
    assert "file should be of size" in complaint
    server.faults.clear()
    assert gpt2("some/tiny") == (0, tiny[1], "")
