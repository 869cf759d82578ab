"""Compares the functions of a student's module with those of gpt2.py, one by one.

A function has either gpt2.py's name and arguments, or those of an equivalent adapter in Stanford's
CS336. If the module uses torch, its functions get tensors, otherwise NumPy arrays.
"""

import importlib.util
import inspect
import os
import sys
from typing import NamedTuple

import numpy as np

import gpt2
from checking import mistakes, names
from checking.precision import Twin, allowed, distance
from checking.recording import with_mistake

FUNCTIONS = ("gelu", "softmax", "layer_norm", "linear", "ffn", "attention_weights", "attention",
             "mha", "transformer_block", "gpt2")  # fmt: skip


class Adapter(NamedTuple):
    """A function of theirs that is equivalent to ours. Call it with arguments(**ours)."""

    name: str
    ours: str
    arguments: object


def attention_mask(q):
    n_seq = q.shape[-2]
    return np.tril(np.ones((n_seq, n_seq), bool))


ADAPTERS = (
    Adapter("run_gelu", "gelu", lambda x: {"in_features": x}),
    Adapter("run_softmax", "softmax", lambda x: {"in_features": x, "dim": -1}),
    Adapter("run_linear", "linear", lambda x, w, b: {
        "d_in": w.shape[0], "d_out": w.shape[1], "weights": w.T, "in_features": x}),
    Adapter("run_scaled_dot_product_attention", "attention", lambda q, k, v: {
        "Q": q, "K": k, "V": v, "mask": attention_mask(q)}),
    Adapter("run_multihead_self_attention", "mha", lambda x, c_attn, c_proj, n_head: {
        "d_model": x.shape[-1], "num_heads": n_head,
        **dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"),
                   np.split(c_attn["w"].T, 3), strict=True)),
        "o_proj_weight": c_proj["w"].T, "in_features": x}),
)  # fmt: skip
WITHOUT_BIAS = ("run_linear", "run_multihead_self_attention")


class Result(NamedTuple):
    """The result of comparing one function of theirs with ours."""

    name: str
    agrees: bool
    problem: str  # in words, if it does not agree
    cause: str | None
    source: names.Source


def load_module(path):
    """Raises ValueError for a file that is missing or cannot be imported."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; name a Python file with your functions")
    spec = importlib.util.spec_from_file_location("student", path)
    if spec is None:
        raise ValueError(f"{path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    return module


def check_module(module, case):  # -> [Result], for each of the functions that the module has
    """Raises ValueError if the module has none of the functions."""
    results = []
    for name in FUNCTIONS:
        theirs = getattr(module, name, None)
        if inspect.isfunction(theirs):
            results.append(check(name, name, theirs, None, case))
    for adapter in ADAPTERS:
        theirs = getattr(module, adapter.name, None)
        if inspect.isfunction(theirs):
            results.append(check(adapter.name, adapter.ours, theirs, adapter.arguments, case))
    if not results:
        wanted = ", ".join([*FUNCTIONS, *(adapter.name for adapter in ADAPTERS)])
        raise ValueError(f"{module.__file__} has none of these functions: {wanted}")
    return results


def check(name, ours, theirs, adapt, case):  # -> Result
    """Calls both functions with the same batch or, if that fails, with a single sequence."""
    problem = None
    line = source_of(ours)
    for is_batch in (True, False):
        args = {p: arguments(ours, case, p, is_batch) for p in ("float64", "float32")}
        if name in WITHOUT_BIAS:
            args = {p: without_bias(a) for p, a in args.items()}
        twin = twin_of(None, ours, args, case)
        given = adapt(**args["float32"]) if adapt else args["float32"]
        try:
            x = call_theirs(theirs, given)
        except Exception as error:
            problem = problem or f"raises {type(error).__name__}: {error}"
            continue
        if x.shape != twin.exact.shape:
            problem = problem or f"returns {list(x.shape)}, expected {list(twin.exact.shape)}"
            continue
        return judge(name, ours, x, twin, args, case, line)
    return Result(name, False, problem, None, line)


def judge(name, ours, x, twin, args, case, line):
    limit = allowed(twin, "float32", case.params["float64"]["wte"].shape[1] * 4)
    theirs = distance(x, twin.exact)
    if theirs.within(limit):
        return Result(name, True, "", None, line)
    found = []
    for mistake in mistakes.FORWARD:
        with np.errstate(all="ignore"):
            wrong = twin_of(mistake, ours, args, case)
        if wrong.exact is None or distance(wrong.exact, twin.exact).rms == 0:
            continue
        if distance(x, wrong.exact).within(allowed(wrong, "float32", 4 * x.shape[-1])):
            found.append((distance(x, wrong.exact).rms, mistake.cause))
    n_nan = np.count_nonzero(~np.isfinite(x))
    problem = (
        f"has {n_nan} numbers that are NaN or infinite"
        if n_nan
        else f"is {theirs.rms:.1e} from the float64 twin, but rounding explains {limit.rms:.1e}"
    )
    return Result(name, False, problem, min(found)[1] if found else None, line)


def source_of(name):
    return names.find_line(gpt2, name, name, "def ")


def twin_of(mistake, ours, args, case):
    """Returns the Twin of our function's results for {precision: its arguments}.

    The errors of a single function hardly grow, so the shaken result isn't needed.
    """
    exact, rounded = (call(mistake, ours, a, case.params[p]) for p, a in args.items())
    return Twin(exact, rounded, rounded)


def call(mistake, name, args, params):
    """Returns what gpt2.py's function returns, or None if the mistake does not fit the shapes."""
    functions = with_mistake(mistake, params)
    try:
        return functions[name](**args)
    except (ValueError, IndexError):
        if mistake is None:
            raise
        return None


def call_theirs(function, args):
    if "torch" in function.__globals__:
        import torch

        args = tree_map(torch.as_tensor, args)
    else:
        args = tree_map(np.asarray, args)
    x = function(**args)
    x = x.detach().numpy() if hasattr(x, "detach") else x
    return np.asarray(x)


def tree_map(f, node):  # f gets copies, because their functions may change their arguments
    if isinstance(node, dict):
        return {key: tree_map(f, child) for key, child in node.items()}
    if isinstance(node, list):
        return [tree_map(f, child) for child in node]
    return f(np.array(node)) if isinstance(node, np.ndarray) else node


def without_bias(args):
    if "b" in args:
        return args | {"b": 0 * args["b"]}
    return args | {
        name: {"w": args[name]["w"], "b": 0 * args[name]["b"]} for name in ("c_attn", "c_proj")
    }


def arguments(name, case, precision, is_batch):  # -> {argument: array} for a function of gpt2.py
    """Returns random inputs, the same in both precisions, and the parameters of the case."""
    params = case.params[precision]
    block = {key: x for key, x in params["blocks"][0].items() if key != "attend"}
    sizes = case.sizes()
    rng = np.random.default_rng(0)
    n_seq, n_embd = sizes["n_seq"], sizes["n_embd"]
    lead = (sizes["n_batch"],) if is_batch else ()

    def normal(*shape):
        x = rng.standard_normal((*lead, *shape), np.float32)
        return x.astype(np.float64) if precision == "float64" else x

    if name in ("gelu", "softmax"):
        return {"x": 2 * normal(n_seq, n_embd)}
    if name in ("attention", "attention_weights"):
        q, k, v = (normal(sizes["n_head"], n_seq, sizes["d_head"]) for _ in range(3))
        return {"q": q, "k": k} | ({"v": v} if name == "attention" else {})
    if name == "gpt2":
        inputs = case.tokens[:, :-1] if is_batch else case.tokens[0, :-1]
        return {"inputs": inputs, **params, "n_head": case.n_head}
    x = normal(n_seq, n_embd)
    parts = {
        "layer_norm": {"x": x / 10, **block["ln_1"]},
        "linear": {"x": x, **block["mlp"]["c_fc"]},
        "ffn": {"x": x, **block["mlp"]},
        "mha": {"x": x, **block["attn"], "n_head": case.n_head},
        "transformer_block": {"x": x, **block, "n_head": case.n_head},
    }
    return parts[name]


def describe(results, path):  # -> lines for people
    lines = []
    for r in results:
        if r.agrees:
            lines.append(f"{r.name}: agrees")
            continue
        lines.append(f"{r.name}: {r.problem}")
        lines.append(f"  made by  {r.source.function}, {r.source.file}:{r.source.line}")
        lines.append(f"  cause    {r.cause or 'not found; none of the common mistakes gives this'}")
    n = sum(r.agrees for r in results)
    return "\n".join([*lines, f"{path}: {n} of {len(results)} functions agree with gpt2.py"])


def data(results):  # -> a dict for JSON
    rows = [
        {"name": r.name, "agrees": r.agrees, "problem": r.problem, "cause": r.cause,
         "function": r.source.function, "file": r.source.file, "line": r.source.line}
        for r in results
    ]  # fmt: skip
    return {"agree": all(r.agrees for r in results), "functions": rows}
