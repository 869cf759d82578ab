"""Model folders against transformers, safetensors and TensorFlow; broken ones against one line."""

import contextlib
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from conftest import REPO, TINY, exclaiming, hugging_face, on_linux, random_params

import utils
from encoder import Encoder
from gpt2 import gelu, gpt2
from model_files import config, download, weights
from plumbing import cli, files

HPARAMS = {"n_vocab": 257, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}


def leaves(params, hparams):
    return {name: weights.leaf(params, name) for name, _ in weights.tensor_shapes(hparams)}


def assert_same(params, wanted, hparams):
    assert len(params["blocks"]) == hparams["n_layer"]
    ours, theirs = leaves(params, hparams), leaves(wanted, hparams)
    for name, array in ours.items():
        assert type(array) is np.ndarray and array.dtype == np.float32
        assert array.flags.c_contiguous and array.flags.aligned and not array.flags.writeable
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.fixture
def saved(rng, tmp_path):
    """A small model, saved: (folder, params)."""
    params = random_params(rng, HPARAMS)
    utils.save_model(tmp_path / "small", Encoder([]), HPARAMS, params)
    return tmp_path / "small", params


def load(folder):
    return utils.load_encoder_hparams_and_params(str(folder), "models")


def refusal(folder, error=ValueError):
    """The message load fails with: one line, and no file appears."""
    before = sorted(os.listdir(folder)) if os.path.isdir(folder) else None
    with pytest.raises(getattr(error, "__args__", error)) as caught:
        load(folder)
    assert before == (sorted(os.listdir(folder)) if os.path.isdir(folder) else None)
    message = cli.one_line(caught.value)
    assert "\n" not in str(caught.value) and message
    return message


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- save and load -------------------------------------------------------------------------


def test_saved_model_loads_the_same(saved):
    folder, params = saved
    encoder, hparams, loaded = load(folder)
    assert hparams == HPARAMS and encoder.n_vocab == 257
    assert encoder.decode(encoder.encode("Müller?")) == "Müller?"
    assert_same(loaded, params, HPARAMS)
    names = {
        "config.json",
        "model.safetensors",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "tokenizer.json",
    }
    assert set(os.listdir(folder)) == names


def test_a_name_under_models_dir_a_path_and_the_projects_own_models(saved, monkeypatch):
    folder, params = saved
    _, _, loaded = utils.load_encoder_hparams_and_params("small", str(folder.parent))
    assert_same(loaded, params, HPARAMS)
    monkeypatch.chdir(folder.parent)
    _, _, loaded = utils.load_encoder_hparams_and_params("small/", "models")
    assert_same(loaded, params, HPARAMS)
    monkeypatch.setattr(utils, "__file__", str(folder.parent / "utils.py"))
    folder.rename(folder.parent / "moved")
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "models").mkdir()
    (folder.parent / "moved").rename(folder.parent / "models" / "small")
    monkeypatch.chdir(folder.parent / "elsewhere")
    _, _, loaded = utils.load_encoder_hparams_and_params("small", "models")
    assert_same(loaded, params, HPARAMS)


def test_float16_on_disk_is_float32_in_memory(rng, tmp_path):
    params = random_params(rng, HPARAMS)
    utils.save_model(tmp_path, Encoder([]), HPARAMS, params, dtype="float16")
    halves = {name: a.astype(np.float16) for name, a in leaves(params, HPARAMS).items()}
    assert_same(load(tmp_path)[2], weights.nest(halves), HPARAMS)
    size = sum(a.nbytes for a in halves.values())
    assert size < os.path.getsize(tmp_path / "model.safetensors") < size + 10_000


@on_linux
def test_loading_maps_the_file_and_copies_nothing(rng, tmp_path):
    hparams = HPARAMS | {"n_vocab": 100_000, "n_embd": 256}  # wte is 100 MB
    utils.save_model(tmp_path, Encoder([]), hparams, random_params(rng, hparams))
    code = f"""if True:
        import resource, utils
        used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = used()
        _, _, params = utils.load_encoder_hparams_and_params({str(tmp_path)!r}, "models")
        print(used() - before, params["wte"].shape)
        assert {str(tmp_path / "model.safetensors")!r} in open("/proc/self/maps").read()
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) < 30_000  # KB


def test_saving_over_the_mapped_file_leaves_the_map_alone(saved, rng):
    folder, params = saved
    encoder, hparams, mapped = load(folder)
    utils.save_model(folder, encoder, hparams, random_params(rng, HPARAMS))
    assert_same(mapped, params, HPARAMS)
    utils.save_model(folder, encoder, hparams, mapped)
    assert_same(load(folder)[2], params, HPARAMS)


def test_saved_files_are_as_readable_as_any_other(saved):
    folder, _ = saved
    umask = os.umask(0)
    os.umask(umask)
    assert {os.stat(folder / n).st_mode & 0o777 for n in os.listdir(folder)} == {0o666 & ~umask}


def test_rows_that_only_pad_the_vocabulary_are_left_out(saved, tmp_path):
    folder, params = saved
    encoder = load(folder)[0]
    padding = np.ones((7, HPARAMS["n_embd"]), np.float32)
    padded = params | {"wte": np.concatenate([params["wte"], padding])}
    utils.save_model(tmp_path / "padded", encoder, HPARAMS | {"n_vocab": 264}, padded)
    _, hparams, loaded = load(tmp_path / "padded")
    assert hparams["n_vocab"] == 257
    assert np.array_equal(loaded["wte"], params["wte"])


def test_the_safetensors_library_reads_what_we_write(saved):
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    folder, params = saved
    tensors = numpy.load_file(folder / "model.safetensors")
    for name, array in leaves(params, HPARAMS).items():
        key = "transformer." + weights.hugging_face_name(name)
        np.testing.assert_array_equal(tensors.pop(key), array)
    assert not tensors


# --- transformers, the independent judge ---------------------------------------------------


def test_transformers_opens_what_we_save(saved, rng):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    folder, params = saved
    model, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    state = model.state_dict()
    for name, array in leaves(params, HPARAMS).items():
        key = "transformer." + weights.hugging_face_name(name)
        np.testing.assert_array_equal(state[key].numpy(), array)
    ids = rng.integers(0, 257, size=16)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(gpt2(ids, **params, n_head=2), theirs, rtol=1e-3, atol=1e-3)
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(folder)
    text = "Zwölf Boxkämpfer — 1984!\n"
    assert tokenizer.encode(text) == Encoder([]).encode(text)


def test_the_guides_lines_for_transformers_give_our_logits(rng, monkeypatch):
    """The shipped model, which is stored as float16."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(REPO)
    code = (REPO / "docs" / "guide.md").read_text("utf-8").split("```python\nimport torch\n")[1]
    names = {"torch": torch}
    exec(code.split("```")[0], names)
    _, hparams, params = utils.load_encoder_hparams_and_params("shakespeare")
    ids = rng.integers(0, hparams["n_vocab"], 40)
    with torch.no_grad():
        logits = names["model"](torch.tensor(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(logits, gpt2(ids, **params, n_head=hparams["n_head"]), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["one file", "shards", "no prefix"])
def test_we_load_what_transformers_saves(tmp_path, dtype, form):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    sizes = {"vocab_size": 257, "n_positions": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model = model.to(getattr(torch, dtype))
    body = model.transformer if form == "no prefix" else model
    body.save_pretrained(tmp_path, max_shard_size="5KB" if form == "shards" else "5GB")
    Encoder([]).save(tmp_path)
    assert os.path.exists(tmp_path / "model.safetensors.index.json") == (form == "shards")
    _, hparams, params = load(tmp_path)
    assert hparams == HPARAMS
    state = model.transformer.state_dict()
    for name, array in leaves(params, HPARAMS).items():
        theirs = state[weights.hugging_face_name(name)].to(torch.float32).numpy()
        np.testing.assert_array_equal(array, theirs)


@pytest.mark.parametrize("n_inner", [None, 20, 32, 33])
def test_any_n_inner_loads_and_is_exported(rng, tmp_path, n_inner):
    """From transformers to us, to a folder, and back to transformers, with the same logits."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("torch", reason="torch is not installed")
    sizes = {theirs: HPARAMS[ours] for ours, theirs in config.HUGGING_FACE_SIZES.items()}
    settings = transformers.GPT2Config(**sizes, n_inner=n_inner)
    model = transformers.GPT2LMHeadModel(settings).eval()
    model.save_pretrained(tmp_path / "theirs")
    Encoder([]).save(tmp_path / "theirs")
    encoder, hparams, params = load(tmp_path / "theirs")
    assert hparams == HPARAMS | ({"n_inner": n_inner} if n_inner in (20, 33) else {})
    assert params["blocks"][1]["mlp"]["c_fc"]["w"].shape == (8, n_inner or 32)
    utils.save_model(tmp_path / "ours", encoder, hparams, params)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert again.config.n_inner == (n_inner if n_inner in (20, 33) else None)
    ids = rng.integers(257, size=(2, 9))
    logits = gpt2(ids, **load(tmp_path / "ours")[2], n_head=2)
    check_logits(logits, ids, model, again, atol=1e-5)


VARIANTS = [
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_variants_that_the_weights_can_make_up_for(rng, tmp_path, variant):
    """transformers' logits; and what is saved again is the plain GPT-2 that computes the same."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    sizes = {theirs: HPARAMS[ours] for ours, theirs in config.HUGGING_FACE_SIZES.items()}
    settings = transformers.GPT2Config(**sizes, **variant, initializer_range=0.5)
    model = transformers.GPT2LMHeadModel(settings).eval()
    for block in model.transformer.h:  # which begins as zeros
        torch.nn.init.normal_(block.attn.c_attn.bias)
    model.save_pretrained(tmp_path / "theirs")
    Encoder([]).save(tmp_path / "theirs")
    utils.save_model(tmp_path / "plain", *load(tmp_path / "theirs"))
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "plain").eval()
    assert plain.config.scale_attn_weights and not plain.config.scale_attn_by_inverse_layer_idx
    ids = rng.integers(257, size=(2, 16))
    logits = gpt2(ids, **load(tmp_path / "theirs")[2], n_head=2)
    check_logits(logits, ids, model, plain, atol=5e-5)


def check_logits(logits, ids, *models, atol):
    """What each of transformers' models says of the ids."""
    import torch

    for model in models:
        with torch.no_grad():
            wanted = model(torch.tensor(ids)).logits
        np.testing.assert_allclose(logits, wanted, atol=atol)


def test_a_folder_that_transformers_saved_whole_loads(saved, tmp_path):
    """Model and tokenizer, the latter as tokenizer.json alone, as transformers 5 does."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder, params = saved
    for kind in (transformers.GPT2LMHeadModel, transformers.GPT2TokenizerFast):
        kind.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    encoder, hparams, loaded = load(tmp_path / "theirs")
    assert hparams == HPARAMS and encoder.encode("a b") == Encoder([]).encode("a b")
    assert_same(loaded, params, HPARAMS)


def test_masks_and_the_tied_head_of_older_files_are_ignored(saved):
    folder, params = saved
    tensors = {weights.hugging_face_name(n): a for n, a in leaves(params, HPARAMS).items()}
    buffer = np.ones((1, 1, 16, 16), np.float32)
    tensors |= {"h.0.attn.bias": buffer, "h.1.attn.masked_bias": buffer[0, 0, 0, :1]}
    weights.write_safetensors(
        folder / "model.safetensors", tensors | {"lm_head.weight": params["wte"]}
    )
    assert_same(load(folder)[2], params, HPARAMS)
    head = {"lm_head.weight": params["wte"][:-1]}
    weights.write_safetensors(folder / "model.safetensors", tensors | head)
    assert "lm_head.weight" in refusal(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_head_with_other_values_than_wte_is_refused(saved, dtype):
    """It was replaced by wte without a word; transformers computes with it."""
    folder, params = saved
    tensors = {weights.hugging_face_name(n): a for n, a in leaves(params, HPARAMS).items()}
    head = params["wte"].copy()
    head[7, 3] += 1e-3
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    path = folder / "model.safetensors"
    weights.write_safetensors(path, tensors | {"lm_head.weight": head.astype(dtype)})
    assert "lm_head.weight differs from wte.weight" in refusal(folder)
    weights.write_safetensors(path, tensors | {"lm_head.weight": tensors["wte.weight"].copy()})
    assert np.array_equal(load(folder)[2]["wte"], tensors["wte.weight"].astype("float32"))


def test_a_file_of_safetensors_own_save_model_loads(saved):
    """It stores lm_head.weight, and no wte: of tied weights, the first by name."""
    torch_files = pytest.importorskip("safetensors.torch")
    folder, params = saved
    torch_files.save_model(hugging_face(params, HPARAMS), folder / "model.safetensors")
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as f:
        names = list(f.keys())
    assert "lm_head.weight" in names and "transformer.wte.weight" not in names
    assert_same(load(folder)[2], params, HPARAMS)


PREFIXES = ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod.transformer."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrapped_models_are_stripped(saved, prefix):
    folder, params = saved
    tensors = {weights.hugging_face_name(n): a for n, a in leaves(params, HPARAMS).items()}
    wrapped = {prefix + name: array for name, array in tensors.items()}
    wrapped[prefix.removesuffix("transformer.") + "lm_head.weight"] = params["wte"].copy()
    weights.write_safetensors(folder / "model.safetensors", wrapped)
    assert_same(load(folder)[2], params, HPARAMS)
    twice = wrapped | {"wte.weight": params["wte"].copy()}
    weights.write_safetensors(folder / "model.safetensors", twice)
    assert "contains wte.weight twice" in refusal(folder)


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"activation_function": "gelu"},
        {"tie_word_embeddings": False},
        {"scale_attn_weights": None},
        {"scale_attn_by_inverse_layer_idx": 2},
        {"layer_norm_epsilon": 1e-6},
        {"n_inner": 33},
        {"n_inner": 0},
        {"n_inner": "32"},
        {"n_inner": True},
        {"add_cross_attention": True},
        {"n_head": 3},
        {"n_layer": 10**12},
        {"n_layer": 2**24},
        {"n_layer": 1},
        {"n_layer": 3},
        {"n_embd": "8"},
        {"n_positions": True},
        {"n_positions": 17},
        {"vocab_size": None},
        {"vocab_size": 256},
        {"n_head": 0},
        {"n_head": -2},
        {"n_embd": 8.0},
    ],
    ids=str,
)
def test_a_configuration_we_would_compute_wrongly_is_refused(saved, change):
    folder, _ = saved
    edit_json(folder / "config.json", **change)
    assert str(folder) in refusal(folder)


OLD_NAMES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}


@pytest.mark.parametrize("keep", [False, True])
def test_the_other_names_of_the_sizes_load(saved, rng, keep):
    """Those of transformers' attribute_map; where a file has both names, they come first."""
    transformers = pytest.importorskip("transformers")
    folder, params = saved
    settings = json.loads((folder / "config.json").read_text())
    for name, other in OLD_NAMES.items():
        settings[other] = settings[name]
        if keep:
            settings[name] += 1
        else:
            del settings[name]
    (folder / "config.json").write_text(json.dumps(settings))
    theirs = transformers.GPT2Config.from_pretrained(folder)
    assert theirs.attribute_map == {other: name for name, other in OLD_NAMES.items()}
    hparams = config.read_hparams(folder)
    assert hparams == HPARAMS
    assert [getattr(theirs, key) for key in config.HUGGING_FACE_SIZES.values()] == [
        hparams[name] for name in config.HUGGING_FACE_SIZES
    ]
    assert_same(load(folder)[2], params, HPARAMS)


def test_sizes_that_a_configuration_leaves_out_are_gpt2s(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = transformers.GPT2Config.from_pretrained(tmp_path)
    assert config.read_hparams(tmp_path) == {
        name: getattr(theirs, key) for name, key in config.HUGGING_FACE_SIZES.items()
    }


@pytest.mark.parametrize("name", config.SUPPORTED["activation_function"])
def test_every_name_of_the_tanh_form_is_the_same_function(saved, rng, name):
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations")
    folder, params = saved
    edit_json(folder / "config.json", activation_function=name)
    assert_same(load(folder)[2], params, HPARAMS)
    x = rng.standard_normal(1000, dtype=np.float32) * 4
    theirs = activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(gelu(x), theirs, atol=2e-6)


def test_harmless_spellings_load(saved):
    folder, params = saved
    same = {
        "activation_function": "gelu_pytorch_tanh",
        "n_inner": 32,
        "reorder_and_upcast_attn": True,
    }
    edit_json(folder / "config.json", **same)
    assert_same(load(folder)[2], params, HPARAMS)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\ud83d", "[" * 100_000], ids=repr)
def test_an_unreadable_config_is_refused(saved, text):
    folder, _ = saved
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "config.json" in refusal(folder)


def test_missing_pieces_are_named(saved, tmp_path):
    folder, _ = saved
    assert "shakespeare, 124M" in refusal("no-such-model") and "shakespeare, 124M" in refusal("")
    with pytest.raises(ValueError, match="small"):
        utils.load_encoder_hparams_and_params("smal", str(tmp_path))
    os.unlink(folder / "tokenizer.json")  # either layout is enough
    load(folder)
    for name, error in [
        ("vocab.json", "tokenizer"),
        ("model.safetensors", "weights"),
        ("config.json", "hparams.json"),
    ]:
        data = (folder / name).read_bytes()
        os.unlink(folder / name)
        assert error in refusal(folder, FileNotFoundError)
        (folder / name).write_bytes(data)
    load(folder)


def test_a_forbidden_file_is_named(saved):
    folder, _ = saved
    for name in ("config.json", "model.safetensors"):
        os.chmod(folder / name, 0)
        if os.access(folder / name, os.R_OK):
            pytest.skip("root may read everything")
        assert "Permission denied" in refusal(folder, PermissionError)
        os.chmod(folder / name, 0o600)


def rewrite_header(path, change):
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    header = change(header) or header
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])


WTE = "transformer.wte.weight"


def again(header, **changes):
    """A header's text with the embedding twice: JSON allows it, and parsers may choose."""
    return f"{json.dumps(header)[:-1]}, {json.dumps({WTE: header[WTE] | changes})[1:]}"


LIES = {
    "negative offset": lambda h: h[WTE].update(data_offsets=[-4, 9596]),
    "past the end": lambda h: h["transformer.ln_f.bias"].update(data_offsets=[0, 2**62]),
    "overlap": lambda h: h["transformer.wpe.weight"].update(data_offsets=[0, 512]),
    "a hole": lambda h: h.pop(WTE) and None,
    "wrong product": lambda h: h[WTE].update(shape=[301, 8]),
    "negative shape": lambda h: h[WTE].update(shape=[-257, -8]),
    "swapped shape": lambda h: h[WTE].update(shape=[8, 257]),
    "huge shape": lambda h: h[WTE].update(shape=[2**62, 2**62]),
    "string bomb": lambda h: h[WTE].update(shape=[10**10, "aaaa"]),
    "float shape": lambda h: h[WTE].update(shape=[257.0, 8]),
    "true shape": lambda h: h[WTE].update(shape=[True, 2400]),
    "deep shape": lambda h: h[WTE].update(shape=[1] * 100 + [257, 8]),
    "integers": lambda h: h[WTE].update(dtype="I32"),
    "doubles": lambda h: h[WTE].update(dtype="F64"),
    "no dtype": lambda h: h[WTE].pop("dtype") and None,
    "dtype a list": lambda h: h[WTE].update(dtype=["F32"]),
    "dtype an object": lambda h: h[WTE].update(dtype={"F32": None}),  # which the library takes
    "entry a number": lambda h: h.update({WTE: 1}),
    "entry a list": lambda h: h.update({WTE: [*h[WTE].values()]}),  # this, too
    "not a number": lambda h: h[WTE].update(shape=[float("nan"), 8]),
    "infinite offset": lambda h: h[WTE].update(data_offsets=[0, float("inf")]),
    "true offset": lambda h: h[WTE].update(data_offsets=[False, 8224]),
    "offset of 400 digits": lambda h: h[WTE].update(data_offsets=[0, 10**400]),
    "offsets turned round": lambda h: h[WTE].update(data_offsets=h[WTE]["data_offsets"][::-1]),
    "twice, the last wrong": lambda h: again(h, shape=[8, 257]),
    "twice, the last beyond the end": lambda h: again(h, data_offsets=[10**6, 10**6 + 8224]),
    "a field twice": lambda h: json.dumps(h).replace('"dtype"', '"shape": [1], "dtype"', 1),
    "deep": lambda h: json.dumps(h).replace('"dtype"', f'"x": {"[" * 999 + "]" * 999}, "dtype"', 1),
    "offsets a word": lambda h: h[WTE].update(data_offsets="ab"),
    "a list": lambda h: [1],
    "nothing": lambda h: {"__metadata__": {}},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_safetensors_header_is_refused(saved, lie):
    folder, _ = saved
    rewrite_header(folder / "model.safetensors", LIES[lie])
    assert "model.safetensors" in refusal(folder)


def test_a_cut_or_overwritten_safetensors_file_is_refused(saved, rng):
    folder, _ = saved
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for n in {0, 1, 7, 8, 9, 100, len(data) - 1, *rng.integers(0, len(data), 20).tolist()}:
        path.write_bytes(data[:n])
        assert "model.safetensors" in refusal(folder)
    for broken in (data + b"x", b"\xff" * 8 + data[8:], struct.pack("<Q", 2**40) + data[8:]):
        path.write_bytes(broken)
        assert "model.safetensors" in refusal(folder)


def test_noise_in_the_header_never_escapes_as_another_error(saved, rng):
    folder, _ = saved
    path = folder / "model.safetensors"
    data = np.frombuffer(path.read_bytes(), np.uint8)
    n_header = 8 + int(data[:8].view("<u8")[0])
    for _ in range(100):
        noisy = data.copy()
        noisy[rng.integers(0, n_header, 3)] = rng.integers(0, 256, 3)
        path.write_bytes(noisy.tobytes())
        with contextlib.suppress(ValueError):
            load(folder)


def backwards(header):  # the entries in the order opposite to that of their bytes
    return dict(reversed(header.items()))


HARMLESS = {
    "backwards": backwards,
    "shifted": lambda h: json.dumps(h) + "   ",  # so that no number is where its size wants it
    "spaces": lambda h: " " + json.dumps(h, indent=3),
    "escapes": lambda h: json.dumps(h).replace(WTE, "\\u0074" + WTE[1:]),
    "twice, the first wrong": lambda h: (
        f"""{{"{WTE}": {{"dtype": "F32", "shape": [7],
        "data_offsets": [1, 29]}}, {json.dumps(h)[1:]}"""
    ),
    "no numbers": lambda h: h | {"x": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}},
}


@pytest.mark.parametrize("form", HARMLESS)
def test_a_header_may_be_written_otherwise(saved, form):
    folder, params = saved
    rewrite_header(folder / "model.safetensors", HARMLESS[form])
    assert_same(load(folder)[2], params, HPARAMS)


@on_linux
def test_a_header_as_large_as_rusts_parser_allows_is_refused(saved):
    """100 MB, of which Python would make 2.5 GB."""
    path = saved[0] / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(struct.pack("<Q", 99_999_999))
        file.truncate(8 + 99_999_999 + 1000)
    assert "the header claims 99999999 bytes" in refusal(saved[0])


@pytest.mark.slow
def test_the_memory_that_a_header_takes_is_bounded(saved):
    folder, _ = saved
    path = folder / "model.safetensors"
    size = files.MOST_BYTES - 10_000

    def crowded(header):  # as many tensors of no numbers as fit
        entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        text = ",".join(f'"{i:x}":{entry}' for i in range(size // (len(entry) + 9)))
        return f"{json.dumps(header)[:-1]},{text}}}"

    rewrite_header(path, crowded)
    code = f"""if True:
        import utils
        utils.load_encoder_hparams_and_params({str(folder)!r}, "models")
        print(*[line for line in open("/proc/self/status") if "VmHWM" in line])
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) < 700_000  # KiB


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 2**24},
        {"n_embd": 2**24},
        {"vocab_size": 2**24},
        {"n_positions": 2**24},
        {"n_layer": 10**400},
        {"n_head": float("inf")},
        {"n_embd": float("nan")},
    ],
    ids=lambda change: str(change)[:30],
)
def test_enormous_sizes_cost_nothing(saved, change):
    folder, _ = saved
    edit_json(folder / "config.json", **change)
    start = time.process_time()
    tracemalloc.start()
    try:
        refusal(folder)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 5


NAMES_OF_TEXTS = ["config.json", "vocab.json", "merges.txt", "tokenizer.json"]
NAMES_OF_TEXTS += ["added_tokens.json", "special_tokens_map.json", "generation_config.json"]
NAMES_OF_TEXTS += ["chat_template.jinja"]


@pytest.mark.parametrize("name", [*NAMES_OF_TEXTS, "index"])
def test_a_text_file_of_any_size_is_not_read(saved, name):
    """A file may have holes, of which a terabyte takes no room on the disk."""
    folder, _ = saved
    if name == "index":
        name = "model.safetensors.index.json"
        os.unlink(folder / "model.safetensors")
    if name in ("vocab.json", "merges.txt"):
        os.unlink(folder / "tokenizer.json")
    with open(folder / name, "ab") as file:
        file.truncate(2**40)
    assert f"{name}: {2**40} bytes, more than the {2**24} allowed" in refusal(folder)


def put_in_the_way(path, kind):
    """What is not an ordinary file, or a link to such: opened or read, most of them never end."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"loop": path.name, "nowhere": "x"}.get(kind, f"/dev/{kind}"))


ODD_KINDS = ["pipe", "folder", "zero", "urandom", "null", "loop", "nowhere"]


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="no signal.alarm to end a wait")
@pytest.mark.parametrize("kind", ODD_KINDS)
def test_what_is_no_ordinary_file_is_not_opened(saved, kind):
    folder, _ = saved
    os.rename(folder / "model.safetensors", folder / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x.safetensors"}}')
    signal.alarm(10)  # which would end this process, and say so
    for name in ("x.safetensors", index.name, "merges.txt", "vocab.json", "config.json"):
        put_in_the_way(folder / name, kind)
        message = refusal(folder, OSError | ValueError)
        assert name in message or name != "x.safetensors"  # another is taken to be missing
    signal.alarm(0)


NAMES = ["..", ".", "/", "~", "-", " ", "a\0b", "124M\0", "a\nb", "\x1b[31m", "a" * 9999, "\udcff"]


@pytest.mark.parametrize("name", [*NAMES, "small/..", "124M/../x", "../models/small/x"], ids=ascii)
def test_a_name_that_means_no_model(saved, name, monkeypatch):
    folder, _ = saved
    monkeypatch.chdir(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        utils.load_encoder_hparams_and_params(name, str(folder.parent))
    message = cli.one_line(caught.value)
    assert message.isprintable() and len(message) < 2100
    beginnings = ("no model", "no folder at", "neither config.json nor hparams.json")
    assert any(words in message for words in beginnings)


def test_what_is_like_no_model_gets_the_nearest_names(saved, monkeypatch):
    folder, _ = saved  # models/small
    monkeypatch.chdir(folder)
    for name, words in {
        "smal": "no model 'smal': did you mean small? choose one of small, 124M, 355M, 774M, 1558M",
        "gpt-2": "no model 'gpt-2': did you mean gpt2",
        "124m": "no model '124m': did you mean 124M? choose",
        "xyzzy": "no model 'xyzzy': choose one of small, 124M",
        "./x/y": "no folder at ./x/y; give a model's folder, or its name",
        "/nowhere/small": "no folder at /nowhere/small; ",
    }.items():
        with pytest.raises(ValueError) as caught:
            utils.find_model(name, str(folder.parent))
        assert str(caught.value).startswith(words)


def test_hugging_faces_names_mean_the_released_sizes(tmp_path, monkeypatch):
    """Unless a folder has that name, in models_dir or here."""
    fetched = []

    def download(size, models_dir, only_tokenizer):
        fetched.append(size)
        (tmp_path / size).mkdir(exist_ok=True)

    monkeypatch.setattr(utils, "download", download)
    monkeypatch.setattr(utils, "has_tensorflow", lambda: True)
    monkeypatch.chdir(tmp_path)
    names = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}
    for name, size in names.items():
        assert utils.find_model(name, str(tmp_path)) == str(tmp_path / size)
    assert fetched == [*names.values()]
    for models_dir in (tmp_path / "models", tmp_path):
        (models_dir / "gpt2").mkdir(parents=True)
        assert utils.find_model("gpt2", str(tmp_path / "models")) == str(models_dir / "gpt2")
        (models_dir / "gpt2").rmdir()
    assert fetched == [*names.values()]


def test_a_model_may_be_a_link_and_have_links(saved, tmp_path):
    """As in Hugging Face's cache, whose folders hold links to the files."""
    folder, params = saved
    (tmp_path / "links").mkdir()
    for path in folder.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    (tmp_path / "link").symlink_to(tmp_path / "links")
    _, _, loaded = utils.load_encoder_hparams_and_params("link", str(tmp_path))
    assert_same(loaded, params, HPARAMS)


def test_a_temporary_file_that_is_there_as_a_link_is_not_followed(tmp_path):
    """A folder that came with links of all such names could overwrite any file of ours."""
    (tmp_path / "precious").write_text("precious")
    for name in ("a.json", "a.safetensors"):
        (tmp_path / f"{name}.{os.getpid()}.tmp").symlink_to("precious")
    files.write_whole(tmp_path / "a.json", "{}")
    weights.write_safetensors(tmp_path / "a.safetensors", {"a": np.zeros(1, np.float32)})
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "a.json").read_text() == "{}"
    (tmp_path / "b.part").symlink_to("precious")
    with pytest.raises(OSError, match="b: Too many levels of symbolic links"):
        download.download_file("http://127.0.0.1:9/b", str(tmp_path / "b"))
    assert (tmp_path / "precious").read_text() == "precious"


BAD_MAPS = [None, [1], {}, {"a": 1}, {"a": "../x"}, {"a": ""}, {"a": "/etc/passwd"}, {"a": "x/y"}]
BAD_MAPS += [{"a": []}, {"a": {"b": 1}}, {"a": 1, "b": "c"}, {"a": None, "b": 2.5}, {"a": "b/"}]
OWN_NAME = "model.safetensors.index.json"
BAD_MAPS += [{"a": OWN_NAME}, {f"{i}": f"{OWN_NAME[: i % 9]}{i}" for i in range(5000)} | {"a": 0}]


@pytest.mark.parametrize("weight_map", BAD_MAPS, ids=lambda weight_map: str(weight_map)[:40])
def test_a_bad_shard_index_is_refused(saved, weight_map):
    folder, _ = saved
    os.rename(folder / "model.safetensors", folder / "x")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "index.json" in refusal(folder)


@pytest.mark.parametrize("shard", ["..", ".", "b\0", "\ud800", "c" * 5000], ids=ascii)
def test_a_shard_that_cannot_be_a_file(saved, shard):
    folder, _ = saved
    os.rename(folder / "model.safetensors", folder / "x")
    (folder / OWN_NAME).write_text(json.dumps({"weight_map": {"a": shard}}))
    assert refusal(folder, OSError | ValueError)


def test_a_missing_shard_is_named(saved):
    folder, _ = saved
    os.rename(folder / "model.safetensors", folder / "x")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert "b.safetensors: No such file" in refusal(folder, FileNotFoundError)


@pytest.mark.parametrize(
    "kind", ["shape", "missing", "blocks", "dtype", "range", "vocab", "layout"]
)
def test_save_refuses_what_disagrees_and_leaves_no_trace(rng, tmp_path, kind):
    params, hparams, dtype = random_params(rng, HPARAMS), dict(HPARAMS), "float32"
    folder, n_vocab = tmp_path / "new", 257
    if kind == "shape":
        params["blocks"][1]["mlp"]["c_fc"]["w"] = np.zeros((32, 8), np.float32)
    elif kind == "missing":
        del params["blocks"][0]["ln_2"]["b"]
    elif kind == "blocks":
        params["blocks"].append(params["blocks"][0])
    elif kind == "dtype":
        dtype = "int8"
    elif kind == "range":
        params["wte"][3, 3], dtype = 1e5, "float16"
    elif kind == "vocab":
        hparams["n_vocab"], params["wte"] = 256, params["wte"][:256]
    elif kind == "layout":
        folder = tmp_path
        (tmp_path / "hparams.json").write_text("{}")
    before = os.listdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        utils.save_model(folder, Encoder([]), hparams, params, dtype=dtype)
    assert os.listdir(tmp_path) == before and "\n" not in str(caught.value), n_vocab


def test_a_full_disk_leaves_the_old_model_and_nothing_else(saved, tmp_path):
    folder, params = saved
    files = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    code = f"""if True:
        import resource, numpy as np, utils
        from model_files import weights
        from plumbing import cli
        encoder, hparams, params = utils.load_encoder_hparams_and_params({str(folder)!r}, "models")
        zeros = {{n: np.zeros(s, np.float32) for n, s in weights.tensor_shapes(hparams)}}
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        for to in ({str(folder)!r}, {str(tmp_path / "new")!r}):
            try:
                utils.save_model(to, encoder, hparams, weights.nest(zeros))
            except OSError as error:
                print(cli.one_line(error))
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines == [f"cannot write {p}: File too large" for p in (folder, tmp_path / "new")]
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == files
    assert os.listdir(tmp_path) == ["small"]


def test_ctrl_c_while_saving_leaves_the_old_model_and_nothing_else(saved, monkeypatch):
    folder, params = saved

    def interrupted(path, tensors):
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "write_safetensors", interrupted)
    names = set(os.listdir(folder))
    with pytest.raises(KeyboardInterrupt):
        utils.save_model(folder, Encoder([]), HPARAMS, params)
    assert set(os.listdir(folder)) == names
    assert_same(load(folder)[2], params, HPARAMS)


def test_saving_where_a_file_is_in_the_way(rng, tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(OSError) as caught:
        utils.save_model(tmp_path / "x", Encoder([]), HPARAMS, random_params(rng, HPARAMS))
    assert cli.one_line(caught.value).startswith(f"cannot write {tmp_path / 'x'}: ")


def test_a_checkpoint_without_tensorflow_says_what_to_install(saved, monkeypatch):
    folder, _ = saved
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    os.unlink(folder / "config.json")
    os.rename(folder / "model.safetensors", folder / "model.ckpt.index")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert "pip install -r requirements.txt" in refusal(folder, ImportError)


def test_a_failed_save_leaves_an_empty_folder_that_was_there(tmp_path, monkeypatch):
    """And takes away one that it made."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(utils, "write_safetensors", full)
    params = exclaiming(TINY)
    (tmp_path / "theirs").mkdir()
    for name in ("theirs", "ours"):
        with pytest.raises(OSError, match="No space left"):
            utils.save_model(tmp_path / name, Encoder([]), TINY, params)
    assert os.listdir(tmp_path) == ["theirs"] and os.listdir(tmp_path / "theirs") == []


def test_a_model_has_names_and_unpacks_as_the_triple(models):
    model = utils.load_encoder_hparams_and_params("tiny", models[0])
    encoder, hparams, params = model
    assert model == (encoder, hparams, params) and model.hparams is hparams == TINY
    assert model.encoder is encoder and model.params is params
