"""Commands execute nothing of the current folder, and work where Python adds no folder (-P)."""

import os
import subprocess
import sys

import pytest
from conftest import REPO, slow

TRAINING = "--data text.txt --out out --n_layer 1 --n_embd 8 --n_ctx 16 --n_steps 2"
SHARDS = "text.txt --out s --shard_mb 0.001 --workers 2"
COMMANDS = {
    "gpt2": "gpt2.py Once --model_size tiny --n_tokens_to_generate 3",
    "gpt2_pico": "gpt2_pico.py Once --model_size tiny --n_tokens_to_generate 3",
    "llama_pico": "llama_pico.py --help",
    "kv_cache": "kv_cache.py Once --model_size tiny --n_tokens_to_generate 3",
    "explain": "explain.py Once --model_size tiny --out page.html",
    "evaluate": "evaluate.py perplexity --model_size tiny --data text.txt",
    "prepare": f"prepare.py {SHARDS}",
    "backprop": f"backprop.py {TRAINING}",
    "utils": "utils.py --help",
    "parity": "parity.py --help",
    "serve": "serve.py --help",
    "train_jax": f"train_jax.py {TRAINING}",
    "ray": f"prepare.py {SHARDS} --ray local",
}
ALL = [slow(name) if name in ("train_jax", "ray") else name for name in COMMANDS]
# What Python, this project and its libraries import, in the commands or in their workers.
SHADOWS = """threading json regex tempfile signal numpy random logging socket asyncio pyarrow string
    multiprocessing hashlib uuid typing tqdm requests ray yaml grpc psutil jax corpus encoder utils
    fire sitecustomize usercustomize"""


def shadow_modules(folder):
    """Modules of these names, each of which says that it was executed."""
    for name in SHADOWS.split():
        note = f"open({str(folder / 'executed')!r}, 'a').write({name + ' '!r})\n"
        (folder / f"{name}.py").write_text(note)


def run_in(folder, models, name, *flags, **variables):
    script, *args = COMMANDS[name].split()
    (folder / "text.txt").write_text("Once upon a time.\n" * 300)
    command = [sys.executable, *flags, str(REPO / script), *args]
    command += ["--models_dir", str(models[0])] if "tiny" in args else []
    environment = os.environ | variables
    return subprocess.run(
        command, capture_output=True, timeout=200, cwd=folder, env=environment, encoding="utf-8"
    )


@pytest.mark.parametrize("name", ALL)
def test_a_command_executes_nothing_of_the_current_folder(models, tmp_path, name):
    if name == "ray":
        pytest.importorskip("ray", reason="ray is not installed (requirements/ray.txt)")
    shadow_modules(tmp_path)
    done = run_in(tmp_path, models, name)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()


@pytest.mark.parametrize("name", ALL)
def test_a_command_works_where_python_adds_no_folder_to_the_path(models, tmp_path, name):
    if name == "ray":
        pytest.importorskip("ray", reason="ray is not installed (requirements/ray.txt)")
    flags, variables = ([], {"PYTHONSAFEPATH": "1"}) if name == "prepare" else (["-I"], {})
    done = run_in(tmp_path, models, name, *flags, **variables)
    assert done.returncode == 0, done.stderr
