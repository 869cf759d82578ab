"""The Makefile's targets for a machine without make, such as Windows.

    python make.py demo      # installs what generating needs in .venv, then generates a text
    python make.py explain   # writes a page that shows what the shipped model does with a text
    python make.py serve     # serves the shipped model at http://127.0.0.1:8000
    python make.py test      # installs the rest, then runs the quick tests

It needs only Python. Packages are installed once, and again when their requirements file changes.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
TORCH_CPU = "https://download.pytorch.org/whl/cpu"  # PyTorch without CUDA's gigabytes
TARGETS = {  # what each target installs, and then runs
    "demo": (
        "generate",
        ["gpt2.py", "ROMEO:", "--model_size", "shakespeare"]
        + ["--n_tokens_to_generate", "200", "--temperature", "0.8", "--seed", "1"],
    ),
    "explain": (
        "generate",
        ["explain.py", "ROMEO: But soft, what light through yonder window breaks?"]
        + ["--model_size", "shakespeare", "--out", "explain.html"],
    ),
    "serve": ("serve", ["serve.py", "--model_size", "shakespeare"]),
    "test": ("test", ["-m", "pytest", "-m", "not slow"]),
}


def main(words):  # -> an exit code
    if len(words) != 1 or words[0] not in TARGETS:
        print(f"usage: python make.py {'|'.join(TARGETS)}", file=sys.stderr)
        return 2
    if sys.version_info < (3, 11):  # noqa: UP036 (this file is run before anything is checked)
        print("error: Python 3.11 or newer is needed", file=sys.stderr)
        return 2
    name, command = TARGETS[words[0]]
    try:
        install(name)
        return subprocess.run([PYTHON, *command], cwd=ROOT).returncode
    except KeyboardInterrupt:
        return 130
    except subprocess.CalledProcessError as error:
        return error.returncode


def install(name):
    """Installs requirements/NAME.txt into .venv, unless it was done since the file changed."""
    if not PYTHON.exists():
        print("setting up .venv ...", file=sys.stderr)
        venv.create(VENV, with_pip=True)
    done = VENV / name  # the Makefile uses the same file as its mark
    files = [ROOT / "requirements.txt", *ROOT.glob("requirements/*.txt")]
    if done.exists() and done.stat().st_mtime >= max(file.stat().st_mtime for file in files):
        return
    print(f"installing requirements/{name}.txt ...", file=sys.stderr)
    if name == "test":
        install_torch()
    pip("-r", ROOT / "requirements" / f"{name}.txt", check=True)
    done.touch()


def install_torch():
    """Installs PyTorch's CPU build from its own index. If this fails, pip finds another build."""
    lines = (ROOT / "requirements" / "test.txt").read_text("utf-8").splitlines()
    version = next(line for line in lines if line.startswith("torch"))
    options = "--no-deps", "--retries", "0", "--index-url", TORCH_CPU
    pip(*options, version, stderr=subprocess.DEVNULL)


def pip(*words, **options):
    if subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        subprocess.run([PYTHON, "-m", "ensurepip"], check=True)  # uv's environments have no pip
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
    subprocess.run(command, **options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
