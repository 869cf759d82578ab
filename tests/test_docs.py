"""The guided tour: every block of docs/*.md is run, and must print what the page says it prints.

```python blocks are doctests, one namespace per page; ```console blocks are commands, each after a
"$ ", followed by what it prints. Both run in a copy of the project, in the order of the page: one
may read what the one before it wrote. `...` stands for anything, and all white space is alike.
"""

import contextlib
import doctest
import importlib.util
import inspect
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPO, SHAKESPEARE, slow
from test_house import PACKAGES

from model_files import weights

DOCS = REPO / "docs"
NUMBERED = sorted(path.name for path in DOCS.glob("[0-9]*.md"))
PAGES = ["README.md", *NUMBERED, "exercises.md"]
LONG = ["finetuning.md"]  # a page of the guide's, which is run, too
ALL = [DOCS / name for name in [*PAGES, *LONG, "guide.md"]]  # and what is not run, only looked at:
ALL += [
    REPO / name for name in ("README.md", "benchmarks/README.md", "models/shakespeare/README.md")
]
ALIKE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.M)
# See .gitignore.
IGNORED = re.compile(r"^(data|models|\.jax)(/|$)|^(explain|learning)\.html$|__pycache__")
NEEDS = {  # a section in whose blocks the word occurs is left out where this is not there
    "data/shakespeare.txt": SHAKESPEARE.exists(),
    "jax": all(importlib.util.find_spec(name) for name in ("jax", "optax")),
}


def sections(text):  # -> [(title, [(language, code, line)])]
    """The parts of a page that begin with a heading, and their blocks."""
    parts, title = [("", [])], re.compile(r"^#+ (.*)$", re.M)
    fences = list(FENCE.finditer(text))
    inside = [range(*fence.span()) for fence in fences]
    heads = [m for m in title.finditer(text) if not any(m.start() in span for span in inside)]
    for found in sorted([*heads, *fences], key=lambda m: m.start()):
        if found in fences:
            line = text.count("\n", 0, found.start()) + 1
            parts[-1][1].append((found[1], found[2], line))
        else:
            parts.append((found[1], []))
    return parts


def run_page(name, text, project):  # -> why some sections were not run, if any were not
    """AssertionError, with the place, for the first block that does not do what it says."""
    names, missing = {"__name__": "__main__"}, []
    for title, blocks in sections(text):
        code = "".join(code for language, code, _ in blocks if language)
        if lacks := [word for word, there in NEEDS.items() if word in code and not there]:
            missing.append(f"{title}: no {' and no '.join(lacks)}")
            continue
        for language, code, line in blocks:
            assert language in ("", "python", "console"), f"{name}:{line}: a block of {language}"
            if language == "python":
                run_python(code, names, name, line)
            if language == "console":
                run_console(code, project, f"{name}:{line}")
    return missing


def run_python(code, names, name, line):
    parts = doctest.DocTestParser().parse(code, name)
    prose = "".join(part for part in parts if isinstance(part, str)).strip()
    assert not prose, f"{name}:{line}: neither an example nor its output: {prose}"
    examples = [part for part in parts if not isinstance(part, str)]
    assert examples, f"{name}:{line}: a python block without >>>"
    test = doctest.DocTest(examples, names, name, name, line, code)
    test.globs = names  # DocTest made a copy, but the page's next block goes on with them
    report = []
    runner = doctest.DocTestRunner(optionflags=ALIKE, verbose=False)
    runner.run(test, out=report.append, clear_globs=False)
    assert runner.failures == 0, "".join(report)


def run_console(code, project, place):
    commands = re.split(r"^\$ ", code, flags=re.M)
    assert not commands[0] and len(commands) > 1, f"{place}: a console block begins with $"
    for entry in commands[1:]:
        found = re.match(r"((?:.*\\\n)*.*\n)((?:.*\n)*)", entry)  # \ goes on in the next line
        command, wanted = found[1], found[2]
        done = subprocess.run(
            command, shell=True, cwd=project, env=environment(project), capture_output=True,
            stdin=subprocess.DEVNULL, encoding="utf-8", timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{place}: {command}{done.stdout}{done.stderr}"
        right = doctest.OutputChecker().check_output(wanted, done.stdout, ALIKE)
        assert right, f"{place}: $ {command}should print\n{wanted}but prints\n{done.stdout}"


def environment(project):
    """For the pages' commands: `python` is this one, JAX is on the CPU, the home is not touched."""
    return os.environ | {
        "PATH": f"{project}/.bin{os.pathsep}{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "OPENBLAS_NUM_THREADS": "1",  # two threads that wait for each other on a busy machine crawl
        "JAX_COMPILATION_CACHE_DIR": f"{project}/.jax",
        "PYTHONIOENCODING": "utf-8",
    }


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the files that the pages use; the current directory meanwhile."""
    folder = tmp_path / "sixtygpt"
    folder.mkdir()
    for path in REPO.glob("*.*"):
        if path.suffix in (".py", ".md", ".txt"):
            shutil.copy(path, folder)
    for name in ("docs", "benchmarks", "models/shakespeare", *PACKAGES):
        skip = shutil.ignore_patterns("__pycache__", ".*", "checkpoints")
        shutil.copytree(REPO / name, folder / name, ignore=skip)
    if SHAKESPEARE.exists():
        (folder / "data").mkdir()
        shutil.copy(SHAKESPEARE, folder / "data" / "shakespeare.txt")
    (folder / ".bin").mkdir()
    python = folder / ".bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(folder)
    yield folder
    shutil.rmtree(folder)  # pytest would keep it: some megabytes a page


@contextlib.contextmanager
def jax_on_cpu():
    import jax

    with jax.default_device(jax.devices("cpu")[0]):
        yield


def page(name):  # two of them train for some time
    return slow(name) if name in ("12_lora.md", *LONG) else name


@pytest.mark.parametrize("name", [page(name) for name in [*PAGES, *LONG]])
def test_the_blocks_of_a_page_do_what_it_says(name, project):
    text = (DOCS / name).read_text("utf-8")
    imports_jax = ">>> import jax\n" in text
    if imports_jax and not NEEDS["jax"]:
        pytest.skip("jax is not installed, and the whole page is about it")
    before = set(project.rglob("*"))
    with jax_on_cpu() if imports_jax else contextlib.nullcontext():
        missing = run_page(name, text, project)
    written = {str(path.relative_to(project)) for path in set(project.rglob("*")) - before}
    assert not [path for path in written if not IGNORED.search(path)]
    if missing:
        pytest.skip("not all: " + "; ".join(missing))


@pytest.mark.parametrize(
    "block",
    [
        "```python\n>>> 1 + 1\n3\n```\n",
        "```python\n>>> x = 1\n```\n\n```python\n>>> x\n2\n```\n",
        "```python\n>>> 1 / 0\n```\n",
        "```python\n1 + 1\n```\n",
        "```python\n>>> 1 + 1\n2\n\nand so on\n```\n",
        "```console\n$ echo one\ntwo\n```\n",
        "```console\n$ echo one\n```\n",
        "```console\n$ python -c 'print(1)'\n1\n$ python -c 'exit(3)'\n```\n",
        "```console\necho one\n```\n",
        "```bash\necho one\n```\n",
    ],
)
def test_a_block_that_is_wrong_is_found(block, project):
    with pytest.raises(AssertionError):
        run_page("page.md", f"# A page\n\n{block}", project)


def test_blocks_that_are_right_pass(project):
    text = """# A page

```python
>>> x = 20
>>> print("many words", x)
many ... 20
```

```console
$ echo one \\
    two
one two
$ python -c 'print(1)' > written
```

```
any drawing
```

```python
>>> x + int(open("written").read())
21
```
"""
    assert run_page("page.md", text, project) == []


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(REPO)))
def test_fences_links_and_pictures(page):
    text = page.read_text("utf-8")
    fences = FENCE.findall(text)
    assert text.count("```") == 2 * len(fences) and "~~~" not in text  # none is open, or indented
    assert {language for language, _ in fences} <= {"", "python", "console"}
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(REPO), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", [*PAGES, *LONG])
def test_doctest_reads_a_page_as_the_readme_says(name):
    """The command in docs/README.md: its options, and no fence that passes for output."""
    flags = " ".join(f"-o {flag}" for flag in ("ELLIPSIS", "NORMALIZE_WHITESPACE"))
    assert f"python -m doctest {flags} docs/" in (DOCS / "README.md").read_text("utf-8")
    for example in doctest.DocTestParser().get_examples((DOCS / name).read_text("utf-8")):
        assert "```" not in example.want, f"{name}:{example.lineno + 1}: no empty line at the end"


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(REPO)))
def test_every_command_has_its_script_and_its_flags(page):
    """Commands that would download, or train for long, are not run: they are only spelled right."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ )?python (\w[\w/]*\.py)(.*)$", text, re.M)
    lines += re.findall(r"`python (\w[\w/]*\.py)([^`]*)`", text)
    for script, rest in lines:
        assert (REPO / script).exists(), script
        if flags := re.findall(r"--(\w+)", rest.split("#")[0]):
            main = importlib.import_module(script.removesuffix(".py")).main
            assert inspect.signature(main).parameters.keys() >= set(flags), script


def anchors(path):
    """The names that GitHub gives to a page's headings."""
    heads = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_page_is_in_the_index_in_order():
    index = (DOCS / "README.md").read_text("utf-8")
    assert re.findall(r"\]\((\w+\.md)\)", index) == [*NUMBERED, "exercises.md", "guide.md"]
    assert [name[:2] for name in NUMBERED] == [f"{i:02}" for i in range(1, 15)]


def test_page_7_quotes_the_benchmark():
    """The times with a cache are benchmarks/README.md's, of 10 and of 1000 tokens."""
    table = (REPO / "benchmarks" / "README.md").read_text("utf-8")
    text = (DOCS / "07_kv_cache.md").read_text("utf-8")
    quoted = re.search(r"flat, ([\d.]+) ms after 10 tokens and ([\d.]+) ms after 1000", text)
    measured = [re.search(rf"^\| {n} \| ([\d.]+) ms \|", table, re.M)[1] for n in (10, 1000)]
    assert list(quoted.groups()) == measured


def numbers(text):  # -> the set of numbers in it, as they are written
    return set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\w)", text))


def test_the_readmes_table_quotes_the_benchmarks():
    """Each row's figures stand in the section of benchmarks/README.md that its script has."""
    parts = (REPO / "benchmarks" / "README.md").read_text("utf-8").split("\n## ")
    readme = (REPO / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| .* \|((?: [^|]*\|){4}) `benchmarks/(\w+\.py)` \|$", readme, re.M)
    assert len(rows) >= 8
    for figures, script in rows:
        [part] = [part for part in parts if f"`python benchmarks/{script}" in part]
        assert numbers(figures) <= numbers(part), script


def test_figures_that_are_quoted_twice_agree():
    measured = (REPO / "benchmarks" / "README.md").read_text("utf-8").replace(" ", "")
    readme = " ".join((REPO / "README.md").read_text("utf-8").split())
    guide = (DOCS / "guide.md").read_text("utf-8")
    adamw, muon = re.search(
        r"\|thesameontheXeon\|([\d.]+)ms\|\|[\d.]+ms\|[\d.]+ms\|([\d.]+)ms\|", measured
    ).groups()
    times = re.findall(r"^\| (Muon|AdamW), .*? \| \d+ \| (\d+) ms \|", guide, re.M)
    muon, adamw = ("Muon", f"{float(muon):.0f}"), ("AdamW", f"{float(adamw):.0f}")
    assert times == [muon, muon, adamw]
    muon = re.search(r"\|`shakespeare-cpu`\|.*\|([\d.]+)ms\|$", measured, re.M)[1]
    assert f"whose steps take {float(muon):.0f} ms" in readme
    loss = re.search(r"^\| Muon, .*\*\*([\d.]+)\*\*", guide, re.M)[1]
    assert f"**{loss}**" in readme
    whole, parts = re.search(
        r"logitswhole\|(356\d{3})tokens.*\n\|thesame,inparts:astherecipehasit\|(\d+)tokens",
        measured,
    ).groups()
    quoted = re.search(r"124M at ([\d ]+) tokens per second, or ([\d ]+) if the logits", readme)
    assert [int(n.replace(" ", "")) for n in quoted.groups()] == [
        round(int(n), -3) for n in (parts, whole)
    ]
    shipped = (REPO / "models" / "shakespeare" / "README.md").read_text("utf-8")
    shipped = float(re.search(r"\*\*([\d.]+)\*\* nats", shipped)[1])
    exercises = (DOCS / "exercises.md").read_text("utf-8")
    assert f"**{shipped:.3f}** with" in readme
    assert re.findall(r"1\.4\d+", exercises) == [f"{shipped:.3f}"] * 2
    assert f"[The validation loss, from ln 257 to {shipped:.3f}]" in (
        DOCS / "10_training.md"
    ).read_text("utf-8")


def pictures():  # -> {name: the pages that show it}
    shown = {}
    for name in PAGES:
        for link in re.findall(r"!\[[^]]+\]\(([^)]+)\)", (DOCS / name).read_text("utf-8")):
            shown.setdefault(link, []).append(name)
    return shown


def test_each_numbered_page_has_a_picture():
    assert {name for pages in pictures().values() for name in pages} >= set(NUMBERED)


@pytest.mark.slow
def test_draw_makes_every_picture_of_the_pages(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("jax", reason="jax is not installed")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(DOCS / "draw.py"), str(tmp_path)]
    subprocess.run(command, cwd=REPO, env=env, check=True, timeout=300)
    photographs = {"explain.png", "learning.png", "serve.png"}  # screenshot.py's
    ours = {link for link in pictures() if "/" not in link} - photographs
    assert {path.name for path in tmp_path.iterdir()} == ours
    assert {path.name for path in DOCS.glob("*.png")} == ours | photographs
    for name in ours:
        for path in (tmp_path / name, DOCS / name):
            data = path.read_bytes()
            assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) < 60_000
            assert 800 <= int.from_bytes(data[16:20]) <= 1000  # its width


def test_draw_knows_the_loss_that_the_exercise_counts():
    bigram = re.search(r"^BIGRAM = ([\d.]+)", (DOCS / "draw.py").read_text("utf-8"), re.M)[1]
    assert f"\n{bigram}\n" in (DOCS / "exercises.md").read_text("utf-8")


def test_the_sizes_of_the_checkpoint_add_up():
    """Each row of page 11's table is a shape and its product; all of them make 124M."""
    text = (DOCS / "11_checkpoint.md").read_text("utf-8")
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_layer": 12}
    shapes, total = dict(weights.tensor_shapes(hparams)), 0
    rows = re.findall(r"^\| `([\w.]+)` \| ([\d x]+) \| ([\d ]+) \|", text, re.M)
    for name, shape, count in rows:
        shape, count = tuple(map(int, shape.split(" x "))), int(count.replace(" ", ""))
        assert shapes[name.replace(".i.", ".0.")] == shape and math.prod(shape) == count
        total += count * (12 if ".i." in name else 1)
    assert len(rows) == 2 + 12 + 2 and total == 124_439_808
    assert "124 439 808" in text
