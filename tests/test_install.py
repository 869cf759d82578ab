"""Installing: pyproject.toml, the requirements files, the Makefile and make.py name the same."""

import os
import re
import shlex
import shutil
import subprocess
import time
import tomllib

import pytest
from conftest import REPO

import make
from plumbing import cli

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FILES = {  # a file -> the extras that it installs, besides what generating needs
    "requirements/generate.txt": [],
    "requirements/train.txt": ["train"],
    "requirements/serve.txt": ["serve"],
    "requirements.txt": ["train", "tensorflow"],
    "requirements/test.txt": ["test"],
}


def requirements(path):  # -> the lines of a file, and of those that it includes
    lines = set()
    for line in path.read_text("utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            lines |= requirements(path.parent / line.removeprefix("-r "))
        elif line:
            lines.add(re.sub(r"\s", "", line).replace("'", '"'))
    return lines


def packages(entries):  # of pyproject.toml -> the same, with the extras that they name
    lines = set()
    for entry in entries:
        found = re.fullmatch(rf"{PROJECT['name']}\[(.*)\]", entry)
        if found:
            for extra in found[1].split(","):
                lines |= packages(EXTRAS[extra])
        else:
            lines.add(re.sub(r"\s", "", entry).replace("'", '"'))
    return lines


@pytest.mark.parametrize("name", FILES)
def test_a_requirements_file_lists_what_pyproject_does(name):
    wanted = packages(PROJECT["dependencies"])
    for extra in FILES[name]:
        wanted |= packages(EXTRAS[extra])
    assert requirements(REPO / name) == wanted


def test_rays_requirements_are_the_extras():
    assert requirements(REPO / "requirements/ray.txt") == packages(EXTRAS["ray"])


def test_every_extra_has_a_file():
    assert {extra for extras in FILES.values() for extra in extras} | {"ray"} == set(EXTRAS)


def test_the_version_is_the_commands():
    assert PROJECT["version"] == cli.VERSION


# --- make.py --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["demo", "explain", "serve"])
def test_make_py_runs_what_the_makefile_does(target):
    text = (REPO / "Makefile").read_text("utf-8").replace("\\\n", " ")
    rule = re.search(rf"^{target}: \.venv/(\w+)\n\t@\.venv/bin/python (.*)$", text, re.MULTILINE)
    assert make.TARGETS[target] == (rule[1], shlex.split(rule[2]))


def test_make_py_tests_without_the_slow_ones_as_the_makefile_does():
    assert '-m pytest -m "not slow"' in (REPO / "Makefile").read_text("utf-8")
    assert make.TARGETS["test"] == ("test", ["-m", "pytest", "-m", "not slow"])


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """What make.py would run, in a copy of the project's requirements."""
    shutil.copytree(REPO / "requirements", tmp_path / "requirements")
    shutil.copy(REPO / "requirements.txt", tmp_path)
    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(make, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(make, "PYTHON", tmp_path / ".venv" / "python")
    ran = []

    def run(command, **options):
        ran.append([str(word) for word in command[1:]])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(make.subprocess, "run", run)

    def create(folder, with_pip):
        folder.mkdir()
        (folder / "python").touch()

    monkeypatch.setattr(make.venv, "create", create)
    return ran


def test_make_py_installs_once_and_again_when_a_file_changes(commands, tmp_path):
    def installs():
        found = [words for words in commands if "install" in words]
        commands.clear()
        return [words[-1] for words in found]

    generate = tmp_path / "requirements" / "generate.txt"
    assert make.main(["demo"]) == 0
    assert commands[-1] == make.TARGETS["demo"][1]
    assert installs() == [str(generate)]
    assert make.main(["demo"]) == 0 and installs() == []
    future = time.time() + 10
    os.utime(generate, (future, future))
    assert make.main(["demo"]) == 0 and installs() == [str(generate)]
    assert make.main(["test"]) == 0
    torch, everything = installs()
    assert re.fullmatch(r"torch==[\d.*]+", torch) and everything.endswith("test.txt")


def test_make_py_says_what_it_takes(capsys):
    for words in ([], ["bake"], ["demo", "twice"]):
        assert make.main(words) == 2
        assert capsys.readouterr().err == "usage: python make.py demo|explain|serve|test\n"
