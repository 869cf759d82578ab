"""How long is it from the command to the text, beyond the forward passes?

usage: python benchmarks/startup.py TOKENIZER_FOLDER

Makes a folder of GPT-2 124M's shape in OpenAI's layout, converted already, with random weights and
the tokenizer of the given folder (encoder.json + vocab.bpe), and runs gpt2.py on it as a process.
The forward passes alone are timed in another process that is warm. Without an argument it takes
models/124M, where gpt2.py puts its download.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import HPARAMS, ROOT, alternate, machine, random_params

import gpt2
import utils
from model_files import weights

PROMPT, N_TOKENS, ROUNDS = "Alan Turing theorized that computers would one day become", 8, 7
WATCH = "import sys, gpt2; gpt2.main({!r}, 1, {!r}); print(*sys.modules, file=sys.stderr)"


def main(tokenizer_folder):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "124M-shape")
        folder.mkdir()
        for name in ("encoder.json", "vocab.bpe"):
            shutil.copy(tokenizer_folder / name, folder)
        params = random_params()
        shapes = weights.tensor_shapes(HPARAMS)
        tensors = {weights.hugging_face_name(n): weights.leaf(params, n) for n, _ in shapes}
        weights.write_safetensors(folder / "model.safetensors", tensors)
        (folder / "hparams.json").write_text(json.dumps(HPARAMS))
        measure(folder)


def measure(folder):
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(folder), "models")
    ids = encoder.encode(PROMPT)
    flags = [PROMPT, "--model_size", folder, "--n_tokens_to_generate", str(N_TOKENS)]
    command = [sys.executable, ROOT / "gpt2.py", *flags]
    seconds = alternate(
        ROUNDS,
        process=lambda: subprocess.run(command, check=True, capture_output=True),
        passes=lambda: gpt2.generate(ids, params, hparams["n_head"], N_TOKENS),
        numpy=lambda: subprocess.run([sys.executable, "-c", "import numpy"], check=True),
        gpt2=lambda: subprocess.run([sys.executable, "-c", "import gpt2"], check=True, cwd=ROOT),
    )
    watch = [sys.executable, "-c", WATCH.format(PROMPT, str(folder))]
    modules = subprocess.run(watch, check=True, capture_output=True, text=True, cwd=ROOT).stderr
    heavy = {"tensorflow", "jax", "torch"} & set(modules.split())
    print(machine())
    print(f"{len(ids)} + {N_TOKENS} tokens, medians of {ROUNDS} rounds")
    for name, value in seconds.items():
        print(f"{name:34}{value:7.2f} s")
    print(f"{'process beyond the passes':34}{seconds['process'] - seconds['passes']:7.2f} s")
    print(f"imported of tensorflow, jax, torch: {heavy or 'none'}")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) == 2 else ROOT / "models" / "124M"
    if not (folder / "encoder.json").exists():
        sys.exit("usage: python benchmarks/startup.py TOKENIZER_FOLDER (with encoder.json)")
    main(folder)
