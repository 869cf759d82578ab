"""The house: what stands in the root, and that imports go down only, without a circle."""

import ast
import subprocess
import tomllib

import pytest
from conftest import REPO

PACKAGES = (
    "serving",
    "pages",
    "training",
    "evaluation",
    "generation",
    "corpus",
    "checking",
    "model_files",
    "engine",
    "plumbing",
)  # each may import those after it
FROM_ROOT = {"encoder", "gpt2", "utils"}  # what a package may import of the root


def files():
    """The modules that git knows, or all there are where the project is not a checkout."""
    paths = [
        *REPO.glob("*.py"),
        *(path for package in PACKAGES for path in REPO.glob(f"{package}/*.py")),
    ]
    done = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    known = {REPO / name for name in done.stdout.splitlines()}
    return sorted(path for path in paths if not known or path in known)


def name_of(path):  # .../corpus/shards.py -> "corpus.shards"
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in files()}


def imports(path, top_only=False):  # -> the names of all modules that a file imports
    """Those within functions, too, unless top_only."""
    tree = ast.parse(path.read_text("utf-8"))
    found = set()
    for node in ast.iter_child_nodes(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & MODULES.keys()) or {node.module}
    return found


def ours(path, **options):
    return {name for name in imports(path, **options) if name in MODULES}


def package_of(name):
    return name.split(".")[0] if name.split(".")[0] in PACKAGES else None


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name):
    here = package_of(name)
    for other in ours(MODULES[name]):
        there = package_of(other)
        if here and not there:
            assert other in FROM_ROOT, f"{name} imports {other} of the root"
            assert here != "plumbing", f"{name} is plumbing and imports {other}"
        if here and there:
            assert PACKAGES.index(here) <= PACKAGES.index(there), f"{name} imports {other}"


def test_no_module_imports_itself_by_a_detour():
    graph = {name: ours(path) for name, path in MODULES.items()}

    def visit(name, way):
        assert name not in way, " imports ".join([*way[way.index(name) :], name])
        for other in graph[name]:
            visit(other, [*way, name])

    for name in graph:
        visit(name, [])


def test_gpt2_imports_numpy_and_math_alone():
    assert imports(REPO / "gpt2.py", top_only=True) == {"math", "numpy"}
    assert imports(REPO / "gpt2_pico.py", top_only=True) == {"numpy"}
    assert imports(REPO / "llama_pico.py", top_only=True) == {"numpy"}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_is_for_in_one_line(package):
    text = (REPO / package / "__init__.py").read_text("utf-8")
    assert len(text.splitlines()) == 1 and ast.get_docstring(ast.parse(text))


def test_the_root_holds_what_is_read_or_run():
    """A new file in the root needs a line in the README, and a reason not to stand in a package."""
    readme = (REPO / "README.md").read_text("utf-8")
    for name in MODULES:
        if "." not in name and name not in PACKAGES:
            assert f"[`{name}.py`]({name}.py)" in readme, f"{name}.py is not in README's tables"
    for package in PACKAGES:
        assert f"[`{package}/`]({package})" in readme, f"{package}/ is not in README's tables"


def test_nothing_heavy_is_imported_where_it_is_not_needed():
    """JAX by the trainer, its package and --backend jax; TensorFlow only within functions."""
    may = {
        "train_jax",
        "kv_cache_jax",
        *(name for name in MODULES if package_of(name) == "training"),
    }
    need = {name for name in may if {"jax", "optax"} & imports(MODULES[name])}
    for name, path in MODULES.items():
        found = {other.split(".")[0] for other in imports(path)}
        if name not in may:
            assert not found & {"jax", "optax"}, name
            asked = ours(path, top_only=True) & need
            assert not asked, f"{name} imports {asked} before anybody has asked for JAX"
        assert "tensorflow" not in {o.split(".")[0] for o in imports(path, top_only=True)}, name


def test_the_servers_framework_is_the_servers_alone():
    theirs = {"uvicorn", "starlette", "h11"}
    for name, path in MODULES.items():
        if name != "serve" and package_of(name) != "serving":
            assert not theirs & {other.split(".")[0] for other in imports(path)}, name


def test_every_example_in_a_docstring_is_run():
    settings = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))
    collected = [REPO / path for path in settings["tool"]["pytest"]["ini_options"]["testpaths"]]
    with_examples = [path for path in MODULES.values() if "    >>> " in path.read_text("utf-8")]
    for path in with_examples:
        assert {path, *path.parents} & set(collected), path
