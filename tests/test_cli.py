"""gpt2.py and gpt2_pico.py as a person runs them: processes, streams, exit codes."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPO, TINY

import gpt2
import utils
from encoder import Encoder


def run(script, *args, models_dir=None, **kwargs):
    where = [] if models_dir is None else ["--models_dir", str(models_dir)]
    command = [sys.executable, str(REPO / script), *args, *where]
    done = subprocess.run(command, capture_output=True, timeout=120, **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def expected(params, prompt, n_tokens, **sampling):
    """What the command line should print, by the functions that it calls."""
    encoder = Encoder([])
    ids = encoder.encode(prompt) or [encoder.endoftext]
    sampling |= {"endoftext": encoder.endoftext}
    return encoder.decode(gpt2.generate(ids, params, 2, n_tokens, **sampling)) + "\n"


@pytest.mark.parametrize(
    "prompt", ["Alan Turing", "1984", "None", "[1, 2]", "", " ", "-", "héllo 🙂", "'\"", "a\nb"]
)
def test_a_prompt_is_text_whatever_it_looks_like(models, prompt):
    folder, params = models
    flags = ["--model_size", "tiny", "--n_tokens_to_generate", "20"]
    code, out, err = run("gpt2.py", prompt, *flags, models_dir=folder)
    assert (code, out, err) == (0, expected(params, prompt, 20), "")


@pytest.mark.parametrize("prompt", ["Alan Turing", "1984", ""])
def test_pico_writes_the_same(models, prompt):
    folder, params = models
    flags = ["--model_size", "tiny", "--n_tokens_to_generate", "12"]
    code, out, err = run("gpt2_pico.py", prompt, *flags, models_dir=folder)
    assert (code, err) == (0, "")
    assert out == expected(params, prompt, 12)


def test_both_stop_at_endoftext(models):
    """A model whose every logit but the end of text's is 0 there."""
    folder, params = models
    silent = utils.nest({n: np.zeros(s, np.float32) for n, s in utils.tensor_shapes(TINY)})
    silent["ln_f"]["b"] += 1
    silent["wte"][-1] += 1
    utils.save_model(folder / "silent", Encoder([]), TINY, silent)
    for script in ("gpt2.py", "gpt2_pico.py"):
        done = run(script, "Once", "--model_size", "silent", models_dir=folder)
        assert done == (0, "\n", "")


def test_an_empty_prompt_needs_a_tokenizer_with_an_end_of_text(models):
    folder, params = models
    vocab = Encoder([]).vocab
    vocab.pop("<|endoftext|>")
    hparams = TINY | {"n_vocab": 256}
    cut = params | {"wte": params["wte"][:256]}
    utils.save_model(folder / "endless", Encoder([], vocab), hparams, cut)
    code, out, err = run("gpt2.py", "", "--model_size", "endless", models_dir=folder)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "no <|endoftext|>" in err


def test_sampling_flags_reach_the_sampler(models):
    folder, params = models
    flags = [
        "--n_tokens_to_generate",
        "20",
        "--temperature",
        "0.8",
        "--top_k",
        "40",
        "--top_p",
        "0.9",
        "--seed",
        "7",
    ]
    code, out, err = run("gpt2.py", "Once", "--model_size", "tiny", *flags, models_dir=folder)
    assert (code, err) == (0, "")
    sampling = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 7}
    assert out == expected(params, "Once", 20, **sampling)


def test_prompt_and_new_tokens_may_fill_the_context_exactly(models):
    folder, params = models
    flags = ["--model_size", "tiny", "--n_tokens_to_generate", "44"]
    assert run("gpt2.py", "Once", *flags, models_dir=folder)[1] == expected(params, "Once", 44)


BAD = {
    "beyond n_ctx": (["Once", "--n_tokens_to_generate", "45"], "48 positions (n_ctx)"),
    "a long prompt": (["x" * 49, "--n_tokens_to_generate", "0"], "49 prompt tokens"),
    "a negative count": (["Once", "--n_tokens_to_generate", "-1"], "must be 0 or more, not -1"),
    "no number": (["Once", "--n_tokens_to_generate", "many"], "expected a whole number"),
    "top_p 0": (["Once", "--top_p", "0"], "top_p must be above 0"),
    "top_p 1.5": (["Once", "--top_p", "1.5"], "top_p must be above 0"),
    "top_k -1": (["Once", "--top_k", "-1"], "top_k must be"),
    "temperature -1": (["Once", "--temperature", "-1"], "temperature must be"),
    "temperature nan": (["Once", "--temperature", "nan"], "temperature must be"),
    "seed -1": (["Once", "--temperature", "1", "--seed", "-1"], "seed must be"),
    "top_p nan, and no model": (["Once", "--top_p", "nan", "--model_size", "huge"], "top_p must"),
    "an unknown flag": (["Once", "--temprature", "1"], "--temprature"),
    "no prompt": ([], "prompt"),
    "an unknown model": (["Once", "--model_size", "huge"], "no model 'huge'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_ends_in_one_line_and_exit_code_2(models, case):
    args, words = BAD[case]
    size = [] if "--model_size" in args else ["--model_size", "tiny"]
    code, out, err = run("gpt2.py", *args, *size, models_dir=models[0])
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_pico_refuses_what_does_not_fit(models):
    code, out, err = run("gpt2_pico.py", "x" * 40, "--model_size", "tiny", models_dir=models[0])
    assert (code, out) == (2, "") and err.count("\n") == 1 and "n_ctx 48" in err


def test_without_a_network_one_line_names_the_model_that_needs_none(tmp_path):
    env = os.environ | {"SIXTYGPT_DOWNLOAD_URL": "http://127.0.0.1:9"}
    code, out, err = run("gpt2.py", "Once", models_dir=tmp_path, env=env)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "--model_size shakespeare" in err
    assert os.listdir(tmp_path) == []


def test_text_appears_while_it_is_made_and_ctrl_c_ends_it_quietly(models):
    """A model big enough to be slow: its first words must come long before its last."""
    hparams = TINY | {"n_ctx": 1024, "n_embd": 256, "n_layer": 8}
    arrays = {n: np.ones(shape, np.float32) for n, shape in utils.tensor_shapes(hparams)}
    utils.save_model(models[0] / "slow", Encoder([]), hparams, utils.nest(arrays))
    flags = ["--model_size", "slow", "--n_tokens_to_generate", "1000"]
    command = [sys.executable, str(REPO / "gpt2.py"), "Once", *flags, "--models_dir", models[0]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(3) == b"!!!"  # equal logits: the first id, whose byte is "!"
    assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == b"" and len(out) < 990


def test_the_shipped_model_writes_like_a_play():
    flags = [
        "--model_size",
        "shakespeare",
        "--n_tokens_to_generate",
        "150",
        "--temperature",
        "0.8",
        "--seed",
        "1",
    ]
    code, out, err = run("gpt2.py", "ROMEO:", *flags, cwd="/")
    assert (code, err) == (0, "")
    words = out.replace("\n", " ").split()
    assert sum(word.strip(".,;:!?'").islower() for word in words) > 15
    assert {"the", "and", "to", "I", "of", "you", "my", "that", "in", "is"} & set(words)


# What `make demo` does not install. A finder that knows none of it makes it so.
WITHOUT = """
import runpy, sys
HEAVY = "jax jaxlib optax tensorflow torch transformers matplotlib ray pyarrow zstandard"

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY.split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("gpt2.py Once --model_size tiny --n_tokens_to_generate 3", None),
        ("gpt2_pico.py Once --model_size tiny --n_tokens_to_generate 3", None),
        ("kv_cache.py Once --model_size tiny --n_tokens_to_generate 3", None),
        ("explain.py Once --model_size tiny --out page.html", None),
        ("evaluate.py perplexity --model_size tiny --data text.txt", None),
        ("prepare.py text.txt --out shards", None),
        ("prepare.py text.txt --out shards2 --ray auto", "pip install -r requirements-ray.txt"),
        ("prepare.py text.parquet --out shards3", "pip install pyarrow"),
        ("train_jax.py --data text.txt --out out", "pip install -r requirements.txt"),
    ],
)
def test_what_is_not_installed_is_not_needed_or_asked_for(models, tmp_path, line, wanted):
    for name in ("text.txt", "text.parquet"):
        (tmp_path / name).write_text("some text\n" * 40)
    script, *args = line.split()
    command = [sys.executable, "-c", WITHOUT, str(REPO / script), *args]
    command += ["--models_dir", str(models[0])] if "tiny" in args else []
    done = subprocess.run(command, capture_output=True, timeout=120, cwd=tmp_path, encoding="utf-8")
    if wanted is None:
        assert done.returncode == 0, done.stderr
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.endswith(f"{wanted}\n")
        assert done.stderr.count("\n") == 1
