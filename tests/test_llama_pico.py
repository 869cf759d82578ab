"""llama_pico.py against transformers' LlamaForCausalLM, on random models of odd shapes."""

import ast
import json
import sys

import numpy as np
import pytest
from conftest import call

import llama_pico
from model_files import llama as files

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPES = {  # what differs from Llama's own 7B, and where one could go wrong
    "one key per query": {"num_key_value_heads": 6},
    "groups": {"num_key_value_heads": 2},
    "one key for all": {"num_key_value_heads": 1},
    "theta": {"theta": 500.0},
    "tied": {"tie_word_embeddings": True},
    "narrow heads": {"head_dim": 2},
    "wide heads": {"head_dim": 14, "num_key_value_heads": 3},
    "eps": {"rms_norm_eps": 0.3},
    "all": {
        "num_key_value_heads": 2,
        "theta": 31.0,
        "tie_word_embeddings": True,
        "head_dim": 10,
        "rms_norm_eps": 1e-2,
    },
}


def random_llama(rng, theta=10000.0, **options):
    """transformers' Llama with parameters that are nowhere near 0 and 1."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 37,
        "num_hidden_layers": 12,  # so that the tenth block's name sorts before the second's
        "num_attention_heads": 6,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    rope = {"rope_type": "default", "rope_theta": theta}
    config = transformers.LlamaConfig(**sizes | {"rope_parameters": rope} | options)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            values = rng.normal(size=parameter.shape) * 0.3 + (parameter.ndim == 1)
            parameter.copy_(torch.tensor(values))
    return model


def logits_of(model, ids):
    with torch.no_grad():
        return model.float()(torch.tensor(ids)[None]).logits[0].numpy()


def our_logits(folder, ids):
    params, hparams = files.read_llama(folder)
    return llama_pico.llama(ids, **params, **hparams)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(rng, tmp_path, shape):
    model = random_llama(rng, **SHAPES[shape])
    model.save_pretrained(tmp_path)
    for n_seq in (1, 2, 33):
        ids = rng.integers(61, size=n_seq)
        ours = our_logits(tmp_path, ids)
        assert ours.dtype == np.float32 and ours.shape == (n_seq, 61)
        np.testing.assert_allclose(ours, logits_of(model, ids), rtol=1e-4, atol=1e-4)


def test_theta_where_older_configs_have_it(rng, tmp_path):
    model = random_llama(rng, theta=77.0)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, rope_parameters=None, rope_theta=77.0, rope_scaling=None)
    ids = rng.integers(61, size=20)
    np.testing.assert_allclose(our_logits(tmp_path, ids), logits_of(model, ids), 1e-4, 1e-4)


def test_shards(rng, tmp_path):
    model = random_llama(rng, num_key_value_heads=2)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = rng.integers(61, size=20)
    np.testing.assert_allclose(our_logits(tmp_path, ids), logits_of(model, ids), 1e-4, 1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(rng, tmp_path, dtype):
    model = random_llama(rng, num_key_value_heads=2).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    # Read again, since .to() also rounds the rotary frequencies.
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = rng.integers(61, size=20)
    np.testing.assert_allclose(our_logits(tmp_path, ids), logits_of(model, ids), 1e-4, 1e-4)


def test_greedy_text_is_that_of_transformers(rng, tmp_path):
    model = random_llama(rng, num_key_value_heads=3)
    model.save_pretrained(tmp_path)
    prompt = rng.integers(61, size=5).tolist()
    inputs = torch.tensor([prompt])
    mask = torch.ones_like(inputs)  # or an id 0 would count as padding
    theirs = model.generate(
        inputs, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0, 5:].tolist()
    words = " ".join(map(str, prompt))
    done = call("llama_pico.py", words, tmp_path, "--n_tokens_to_generate", "12")
    assert done == (0, " ".join(map(str, theirs)) + "\n", "")
    change_config(tmp_path, eos_token_id=[theirs[4], 60])  # the text ends there
    n_before = min(theirs.index(token) for token in (theirs[4], 60) if token in theirs)
    done = call("llama_pico.py", words, tmp_path, "--n_tokens_to_generate", "12")
    assert done == (0, " ".join(map(str, theirs[:n_before])) + "\n", "")


def save_tokenizer(folder):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    letters = {chr(32 + i): i for i in range(61)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_text_by_the_tokenizers_package(rng, tmp_path, monkeypatch):
    random_llama(rng).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    ids = [ord(char) - 32 for char in "HELLO"]
    params, hparams = files.read_llama(tmp_path)
    new_ids = llama_pico.generate(ids, params, hparams, 9)
    done = call("llama_pico.py", "HELLO", tmp_path, "-n", "9")
    assert done == (0, "".join(chr(32 + token) for token in new_ids) + "\n", "")
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # not installed
    code, out, err = call("llama_pico.py", "HELLO", tmp_path)
    assert (code, out) == (2, "") and "pip install tokenizers" in err and err.count("\n") == 1
    words = " ".join(map(str, ids))
    done = call("llama_pico.py", words, tmp_path, "-n", "9")
    assert done == (0, " ".join(map(str, new_ids)) + "\n", "")


REFUSED = {
    "scaled rotary": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        "scaled rotary positions ('llama3')",
    ),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "positions ('linear')"),
    "part of a head": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "attention bias": ({"attention_bias": True}, "attention_bias True"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias True"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "another model": ({"model_type": "mistral"}, "model_type 'mistral'"),
    "groups": ({"num_key_value_heads": 4}, "not a multiple of num_key_value_heads"),
    "odd head": ({"head_dim": 5}, "head_dim is 5"),
    "no layers": ({"num_hidden_layers": None}, "num_hidden_layers is None"),
    "theta": ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1"),
    "other sizes": ({"intermediate_size": 36}, "config.json asks for (36, 24)"),
    "more layers": (
        {"num_hidden_layers": 13},
        "model.layers.12.input_layernorm.weight is missing",
    ),  # fmt: skip
    "fewer layers": ({"num_hidden_layers": 11}, "is not a tensor of a plain Llama"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_plain_llama_is_refused_in_a_line(rng, tmp_path, case):
    changes, words = REFUSED[case]
    random_llama(rng).save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    code, out, err = call("llama_pico.py", "1 2", tmp_path)
    assert (code, out) == (2, "") and words in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_biases_that_the_config_does_not_mention_are_refused(rng, tmp_path):
    model = random_llama(rng, attention_bias=True)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, attention_bias=False)
    code, out, err = call("llama_pico.py", "1 2", tmp_path)
    assert (code, out) == (2, "") and "_proj.bias is not a tensor of a plain Llama" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([""], "the prompt has no tokens"),
        (["1 61"], "from 0 to 60"),
        (["-1 5"], "from 0 to 60"),
        (["5", "-n", "-1"], "n_tokens_to_generate must be 0 or more, not -1"),
    ],
)
def test_a_prompt_that_makes_no_sense_is_one_line(rng, tmp_path, args, words):
    random_llama(rng).save_pretrained(tmp_path)
    code, out, err = call("llama_pico.py", args[0], tmp_path, *args[1:])
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_damaged_weights_are_one_line(rng, tmp_path):
    model = random_llama(rng)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    code, out, err = call("llama_pico.py", "1 2", tmp_path)
    assert (code, out) == (2, "") and "not finite" in err and err.count("\n") == 1


def test_rotary_scores_depend_on_the_distance_alone(rng):
    q, k = rng.normal(size=(2, 1, 1, 8))
    q, k = (llama_pico.rotate(np.repeat(x, 50, axis=1), 100.0) for x in (q, k))
    scores = (q @ k.swapaxes(1, 2))[0]
    for distance in range(50):
        diagonal = np.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-9, atol=1e-9)
    assert np.ptp(scores) > 0.1


def test_it_is_sixty_lines_of_numpy():
    with open(llama_pico.__file__, encoding="utf-8") as f:
        lines = f.read().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 60
    assert max(map(len, lines)) <= 100
    tree = ast.parse("\n".join(lines))
    imports = [ast.unparse(n) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert imports == ["import numpy as np"]
