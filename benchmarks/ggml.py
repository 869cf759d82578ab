"""How fast does the cached engine write, beside ggml, the library under llama.cpp?

usage: pip install llama-cpp-python gguf; python benchmarks/ggml.py     # compiles for some minutes

The same random weights of GPT-2 124M's shape: float32 here, and float32, float16 and int8 (Q8_0) in
ggml, each as a GGUF file. A step writes one token for every row of the batch: the difference
between writing 40 and 8 tokens after 16, by 32, as in decode.py. Both sides use as many threads as
there are cores.
"""

import tempfile
from functools import partial
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from common import HPARAMS, LONG, N_PROMPT, machine, print_table, random_params, step_seconds

import kv_cache
from engine.threads import usable_cores
from model_files import weights

N_HEAD, N_VOCAB = HPARAMS["n_head"], HPARAMS["n_vocab"]
ROWS = (1, 8, 32)
KINDS = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def write_gguf(path, params, kind):
    """Writes matrices as `kind`, and everything else as float32. The vocabulary is made up."""
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(HPARAMS["n_ctx"])
    writer.add_embedding_length(HPARAMS["n_embd"])
    writer.add_feed_forward_length(4 * HPARAMS["n_embd"])
    writer.add_head_count(N_HEAD)
    writer.add_block_count(HPARAMS["n_layer"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{id}" for id in range(N_VOCAB)])
    writer.add_token_types([1] * N_VOCAB)
    writer.add_token_merges(["t 1"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, HPARAMS["n_layer"])
    for name, _ in weights.tensor_shapes(HPARAMS):
        their_name = names.get_name(
            "transformer." + weights.hugging_face_name(name), try_suffixes=(".weight", ".bias")
        )
        array = weights.leaf(params, name)
        is_matrix = array.ndim == 2 and name != "wpe"
        if is_matrix and name != "wte":
            array = np.ascontiguousarray(array.T)
        packed = gguf.quants.quantize(array, kind) if is_matrix else array
        raw_dtype = kind if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(their_name, packed, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Ggml:
    """A model in ggml. Rows are sequences of one context, as kv_cache's are of one batch."""

    def __init__(self, path):
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, f"llama.cpp can't load {path}"
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = max(ROWS) * (N_PROMPT + LONG)
        settings.n_batch = settings.n_ubatch = max(ROWS) * N_PROMPT
        settings.n_seq_max = max(ROWS)
        settings.kv_unified = True
        settings.n_threads = settings.n_threads_batch = usable_cores()
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def run(self, new_ids, start):  # a list of ids for each row -> [n_rows, n_vocab]
        """Runs new ids at positions from `start` on, and returns the logits of each row's last."""
        batch, i, last = self.batch, 0, []
        for row, ids in enumerate(new_ids):
            for position, id in enumerate(ids, start):
                batch.token[i], batch.pos[i] = id, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = position == start + len(ids) - 1
                i += 1
            last.append(i - 1)
        batch.n_tokens = i
        assert llama_cpp.llama_decode(self.context, batch) == 0
        pointers = [llama_cpp.llama_get_logits_ith(self.context, i) for i in last]
        return np.stack([np.ctypeslib.as_array(p, (N_VOCAB,)) for p in pointers])

    def write(self, ids, n):  # rows of ids, and how many tokens -> rows of new ids
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        best = self.run(ids, 0).argmax(-1)
        texts = [best]
        for i in range(1, n):
            best = self.run(best[:, None].tolist(), N_PROMPT + i - 1).argmax(-1)
            texts.append(best)
        return np.stack(texts, -1).tolist()


def ours(params, ids, n):
    return kv_cache.generate(ids, params, N_HEAD, n, batch_size=64, lookup=0)


def compare(params, engine):
    """How far are a prompt's logits from ours, beside how far they spread?"""
    ids = np.random.default_rng(0).integers(0, N_VOCAB, N_PROMPT).tolist()
    cache = kv_cache.new_cache(params, N_HEAD)
    exact = kv_cache.prefill(cache, ids, params, N_HEAD)
    return float(np.abs(engine.run([ids], 0)[0] - exact).max() / exact.std())


def main():
    log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(log, None)
    params = random_params()
    print(f"{machine()}, llama-cpp-python {llama_cpp.__version__}")
    engines = {"kv_cache": partial(ours, params)}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in KINDS.items():
            path = Path(folder, f"{name}.gguf")
            write_gguf(path, params, kind)
            engine = Ggml(path)
            error = compare(params, engine)
            print(f"ggml, {name}: the largest difference of a logit is {error:.4f} of their spread")
            engines[f"ggml_{name}"] = engine.write
        for n_rows in ROWS:
            shape = n_rows, N_PROMPT
            ids = np.random.default_rng(n_rows).integers(0, N_VOCAB - 1, shape).tolist()
            assert engines["ggml_float32"](ids, LONG) == engines["kv_cache"](ids, LONG)
            print_table(
                f"a step of {n_rows} row{'s' * (n_rows > 1)}",
                step_seconds(engines, ids),
                "kv_cache",
            )


if __name__ == "__main__":
    main()
