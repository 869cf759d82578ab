"""plumbing/cli.py, then gpt2.py and gpt2_pico.py as a person runs them: streams, signals, codes."""

import contextlib
import functools
import importlib
import inspect
import io
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPO, TINY, call, exclaiming, run, tree_map

import gpt2
import utils
from encoder import Encoder
from generation import terminal
from model_files import download, weights
from plumbing import cli

# --- plumbing/cli.py ------------------------------------------------------------------------------

SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
from plumbing import cli

def main(prompt: str, n_tokens: int = 40, heat: float = 0.0, top_k: int | None = None,
         note: str | None = None, quick: bool = False):
    \"\"\"Continue a PROMPT.

    Args:
        prompt: the text to continue
        heat: how daring
    \"\"\"
    print("ran", ascii((prompt, n_tokens, heat, top_k, note, quick)))
    if prompt == "print":
        print("é€😀")
    if prompt == "wait":
        sys.stdout.flush(); time.sleep(60)
    if prompt == "flood":
        while True: print("x" * 100)
    if prompt == "value":
        raise ValueError("one\\ntwo")
    if prompt == "write":
        open(__file__ + "/x", "w")
    if prompt == "import":
        import no_such_thing

cli.run_cli(main)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "speak.py"
    path.write_text(SCRIPT)
    return path


def outcome(monkeypatch, capsys, *argv):
    """run_cli in this process: (the arguments main got or None, exit code, stderr)."""
    got = []

    def main(
        prompt: str,
        n_tokens: int = 40,
        heat: float = 0.0,
        top_k: int | None = None,
        note: str | None = None,
        quick: bool = False,
    ):
        got.append((prompt, n_tokens, heat, top_k, note, quick))

    monkeypatch.setattr(sys, "argv", ["speak.py", *argv])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    code = 0
    try:
        cli.run_cli(main)
    except SystemExit as stop:
        code = stop.code
    return (got[0] if got else None), code, capsys.readouterr().err


PROMPTS = [
    "1984",
    "None",
    "[1]",
    "{}",
    "True",
    "1e3",
    "-",
    "--",
    "---",
    "",
    " ",
    "-1",
    "a=b",
    "x - y",
]
PROMPTS += [
    "-- yes, dashes",
    "--a b",
    "- item",
    "'quoted'",
    '"',
    "\\n",
    "\n",
    "#",
    "😀",
    "__class__",
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
def test_a_prompt_is_text_whatever_it_looks_like(monkeypatch, capsys, prompt):
    wanted = (prompt, 40, 0.0, None, None, False)
    assert outcome(monkeypatch, capsys, prompt) == (wanted, 0, "")
    assert outcome(monkeypatch, capsys, f"--prompt={prompt}") == (wanted, 0, "")
    assert outcome(monkeypatch, capsys, "--prompt", prompt)[0] == wanted
    wanted = (prompt, 7, 0.5, 3, "None", True)
    argv = [prompt, "--n_tokens=7", "--heat", ".5", "--top-k", "3", "--note", "None", "--quick"]
    assert outcome(monkeypatch, capsys, *argv) == (wanted, 0, "")


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["a", "--n_tokens", "abc"], "--n_tokens: expected a whole number, got 'abc'"),
        (["a", "--n_tokens", "1.5"], "--n_tokens: expected a whole number, got '1.5'"),
        (["a", "--heat", "warm"], "--heat: expected a number, got 'warm'"),
        (["a", "--quick=maybe"], "--quick: expected True or False, got 'maybe'"),
        (["a", "--top_k", "few"], "--top_k: expected a whole number, got 'few'"),
        (["a", "--note", "--quick"], "--note needs a value"),
        (["a", "--tempo", "1"], "no flag --tempo (--help"),
        (["a", "--n-token", "1"], "no flag --n-token: did you mean --n_tokens? (--help"),
        (["a", "--tokens=1"], "no flag --tokens: did you mean --n_tokens? (--help"),
        (["a", "--notes", "b"], "no flag --notes: did you mean --note or"),
        (["a", "--nonote"], "no flag --nonote"),
        (["a", "-n", "1"], "no flag -n: did you mean --n_tokens or --note?"),
        (["a", "-x"], "no flag -x (--help"),
        (["a", "--top_k"], "--top_k needs a value (if it starts with a dash, write --top_k=-x)"),
        (["a", "b"], "--n_tokens: expected a whole number, got 'b'"),
        (["a", "1", "2", "3", "4", "true", "b"], "one word too many: b"),
        ([], "prompt"),
    ],
    ids=str,
)
def test_a_line_not_understood_is_one_line_and_runs_nothing(monkeypatch, capsys, argv, complaint):
    got, code, err = outcome(monkeypatch, capsys, *argv)
    assert (got, code) == (None, 2)
    assert (
        err.startswith("error: ") and complaint in err and err.count("\n") == 1 and "\0" not in err
    )


def test_none_is_a_number_left_out_and_a_bool_can_be_spelt(monkeypatch, capsys):
    argv = ["a", "--top_k", "None", "--quick=true"]
    assert outcome(monkeypatch, capsys, *argv)[0] == ("a", 40, 0.0, None, None, True)
    assert outcome(monkeypatch, capsys, "a", "--noquick")[0][-1] is False


def test_a_flag_for_true_or_false_leaves_the_next_word_alone(monkeypatch, capsys):
    wanted = ("a", 40, 0.0, None, None, True)
    assert outcome(monkeypatch, capsys, "--quick", "a") == (wanted, 0, "")
    assert outcome(monkeypatch, capsys, "--quick", "True", "a") == (wanted, 0, "")
    assert outcome(monkeypatch, capsys, "a", "--quick", "false")[0][-1] is False
    assert outcome(monkeypatch, capsys, "--noquick", "a")[0][-1] is False


def many(monkeypatch, *argv):
    """What a main with varargs, several values and ambiguous letters gets."""
    got = []

    def main(
        *prompts: str,
        n_samples: int = 1,
        n_tokens_to_generate: int = 40,
        stop: tuple[str, ...] | None = None,
        size: str = "",
    ):
        got.append((prompts, n_samples, n_tokens_to_generate, stop, size))

    monkeypatch.setattr(sys, "argv", ["x", *argv])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    cli.run_cli(main)
    return got[0]


def test_varargs_are_text_too(monkeypatch):
    argv = ["1", "-", "[2]", "--n_samples", "3", ""]
    assert many(monkeypatch, *argv) == (("1", "-", "[2]", ""), 3, 40, None, "")


def test_several_values_are_a_flag_repeated(monkeypatch):
    """Whatever is in them. Of a flag for one value the last counts."""
    values = ["a,b", " ", "=", "--", "('c',)", "None"]
    argv = [word for value in values for word in ("--stop", value)]
    assert many(monkeypatch, *argv)[3] == tuple(values)
    assert many(monkeypatch, *(f"--stop={value}" for value in values))[3] == tuple(values)
    assert many(monkeypatch, "--stop", "x", "text", "--size", "a", "--size=b") == (
        ("text",), 1, 40, ("x",), "b"
    )  # fmt: skip


def test_a_letter_means_the_same_flag_everywhere(monkeypatch):
    assert many(monkeypatch, "-n", "7", "text") == (("text",), 1, 7, None, "")
    assert many(monkeypatch, "-n=7")[2] == 7

    def main(train: int = 0, workers: int = 1, big: bool = False, bold: bool = False):
        pass

    parameters = inspect.signature(main).parameters
    hints = {"w": ": did you mean --workers?", "b": ": did you mean --big or --bold?", "q": " (--"}
    for letter, hint in hints.items():
        with pytest.raises(ValueError, match=re.escape(f"no flag -{letter}{hint}")):
            cli.find_flag(f"-{letter}", parameters)


COMMANDS = ["gpt2", "gpt2_pico", "kv_cache", "explain", "evaluate", "prepare", "serve", "utils"]
COMMANDS += ["train_jax", "backprop", "parity", "llama_pico"]


def parameters_of(command):
    return inspect.signature(importlib.import_module(command).main, eval_str=True).parameters


def test_no_letter_means_two_things_in_two_commands():
    meanings = {}
    for command in COMMANDS:
        for letter in "abcdefghijklmnopqrstuvwxyz":
            with contextlib.suppress(ValueError):
                flag, _ = cli.find_flag(f"-{letter}", parameters_of(command))
                meanings.setdefault(letter, set()).add(flag)
    assert meanings == {letter: {flag} for letter, flag in cli.SHORT.items()}


def test_dtype_means_what_is_computed_with_and_saved_dtype_what_is_on_the_disk():
    helps = {"dtype": [], "saved_dtype": []}
    for command in COMMANDS:
        about = inspect.getdoc(importlib.import_module(command).main) or ""
        for name in helps.keys() & parameters_of(command).keys():
            for words in re.findall(rf"^ +{name}: (.*(?:\n {{8}}.*)*)", about, re.MULTILINE):
                helps[name].append((command, "disk" in words))
    assert helps == {
        "dtype": [("train_jax", False), ("parity", False)],
        "saved_dtype": [("utils", True), ("train_jax", True), ("backprop", True)],
    }


@pytest.mark.parametrize(
    "script, typed, ours",
    [
        ("gpt2.py", "--max_new_tokens", "n_tokens_to_generate"),
        ("gpt2.py", "--model", "model_size"),
        ("kv_cache.py", "--num-samples", "n_samples"),
        ("train_jax.py", "--block_size", "n_ctx"),
        ("utils.py", "--dtype", "saved_dtype"),
    ],
)
def test_other_programs_names_suggest_ours(script, typed, ours):
    code, out, err = call(script, "a", "b", "c", typed, "3")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: no flag {typed}: did you mean --{ours}? (--help")


def test_a_flag_that_only_other_commands_have_is_named():
    code, out, err = call("gpt2.py", "a", "--num_samples", "3")
    hint = "only other commands have --n_samples (--help lists them all)"
    wanted = f"error: no flag --num_samples: {hint}\n"
    assert (code, out, err) == (2, "", wanted)


def test_every_suggestion_is_some_commands_flag():
    flags = {flag for command in COMMANDS for flag in parameters_of(command)}
    assert set(cli.OTHER_NAMES.values()) <= flags and not flags & set(cli.OTHER_NAMES)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_version_and_shows_what_letters_mean(name):
    code, out, err = run(f"{name}.py", "--version")
    assert (code, out, err) == (0, f"sixtyGPT {cli.VERSION}\n", "")
    main = importlib.import_module(name).main
    parameters = inspect.signature(main, eval_str=True).parameters
    help_ = run(f"{name}.py", "--help")[1]
    *_, about = (inspect.getdoc(main) or "").partition("Args:")
    for text in re.split(r"^ {4}\w+: ", about, flags=re.MULTILINE):  # fire drops "word: " in a line
        assert " ".join(text.split()) in " ".join(help_.split())
    for letter in "abcdefghijklmnopqrstuvwxyz":
        shown = re.findall(rf"^ +-{letter}, --(\w+)=", help_, re.MULTILINE)
        assert len(shown) < 2
        for flag in shown:
            assert cli.find_flag(f"-{letter}", parameters) == (flag, True)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_value_is_refused_by_every_command(monkeypatch, capsys, name):
    """It comes from a variable that was not set, and must never mean a default or everything."""
    started = []
    main = importlib.import_module(name).main
    recorder = functools.wraps(main)(lambda *args, **kwargs: started.append(kwargs))
    parameters = inspect.signature(main, eval_str=True).parameters.values()
    for p in parameters:
        words = [f"--{other.name}=1" for other in parameters if other.default is p.empty
                 and other is not p and other.kind is not p.VAR_POSITIONAL]  # fmt: skip
        words.append("" if p.kind is p.VAR_POSITIONAL else f"--{p.name}=")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        started.clear()
        code = 0
        try:
            cli.run_cli(recorder)
        except SystemExit as stop:
            code = stop.code
        err = capsys.readouterr().err
        is_text = p.name in cli.MAY_BE_EMPTY
        assert (code, len(started), err.count("\n")) == ((0, 1, 0) if is_text else (2, 0, 1)), p
        assert is_text or f"--{p.name}" in err


def test_one_is_no_plural():
    assert [cli.count(n, "file") for n in range(3)] == ["0 files", "1 file", "2 files"]


def test_a_notice_is_for_a_terminal(monkeypatch, capsys):
    cli.notice("to nobody")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.notice("to a person")
    assert capsys.readouterr().err == "notice: to a person\n"


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["-h"], ["a", "--help"], ["--", "--help"], ["a", "--heat", "1", "-h"]],
    ids=str,
)
def test_help_reads_well(script, argv):
    code, out, err = run(script, REPO, *argv)
    assert (code, err) == (0, "") and "ran" not in out
    for words in ("speak.py PROMPT <flags>", "the text to continue", "--heat=HEAT", "Default: 40"):
        assert words in out
    assert "FIRE" not in out and "\x1b" not in out and "\0" not in out


def test_errors_of_main_are_one_line_and_code_2(script):
    assert run(script, REPO, "value")[0::2] == (2, "error: one two\n")
    assert run(script, REPO, "write")[0::2] == (2, f"error: {script}/x: Not a directory\n")
    code, _, err = run(script, REPO, "import")
    assert code == 2 and "no_such_thing" in err and "pip install" in err and err.count("\n") == 1


def test_stdout_is_utf8_in_any_locale_and_argv_may_be_broken(script):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, out, _ = run(
        script, REPO, "print", env=os.environ | plain | {"PYTHONIOENCODING": "ascii"}
    )
    assert code == 0 and "é€😀" in out
    for env in (os.environ | plain, os.environ):
        code, out, _ = run(script, REPO, b"\xff \xc3\xa9", env=env)
        assert code == 0 and ascii("\ufffd é") in out


def test_ctrl_c_is_quiet_and_130(script):
    process = subprocess.Popen(
        [sys.executable, script, REPO, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline().startswith(b"ran")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_a_closed_pipe_and_a_full_stdout(script):
    process = subprocess.Popen(
        [sys.executable, script, REPO, "flood"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=20) == 141
    process.stderr.close()
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, script, REPO, "print"], stdout=full, stderr=subprocess.PIPE
            )
        assert (done.returncode, done.stderr) == (2, b"error: No space left on device\n")


def test_without_fire_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fire", None)
    got, code, err = outcome(monkeypatch, capsys, "a")
    assert (got, code) == (None, 2) and "pip install -r requirements.txt" in err


def test_an_error_shows_neither_too_much_nor_what_a_terminal_obeys():
    message = cli.one_line(ValueError("\x1b]0;title\x07 é \u202e\n\x9b31m \0 \udcff 中"))
    assert message == r"\x1b]0;title\x07 é \u202e \x9b31m \x00 \udcff 中"
    message = cli.one_line(ValueError("a" * 10**7 + "the end"))
    assert len(message) < 2100 and message.endswith("the end")


# --- gpt2.py and gpt2_pico.py ---------------------------------------------------------------------


def expected(params, prompt, n_tokens, **sampling):
    """What the command line should print, by the functions that it calls."""
    encoder = Encoder([])
    ids = encoder.encode(prompt) or [encoder.endoftext]
    sampling |= {"endoftext": encoder.endoftext}
    return encoder.decode(gpt2.generate(ids, params, 2, n_tokens, **sampling)) + "\n"


@pytest.mark.parametrize(
    "prompt", ["Alan Turing", "1984", "None", "[1, 2]", "", " ", "-", "héllo 🙂", "'\"", "a\nb"]
)
def test_gpt2_takes_any_prompt_as_text(models, prompt):
    folder, params = models
    flags = ["--model_size", "tiny", "--n_tokens_to_generate", "20"]
    code, out, err = call("gpt2.py", prompt, *flags, models_dir=folder)
    assert (code, out, err) == (0, expected(params, prompt, 20), "")


@pytest.mark.parametrize("prompt", ["Alan Turing", "1984", ""])
def test_pico_writes_the_same(models, prompt):
    folder, params = models
    flags = ["--model_size", "tiny", "--n_tokens_to_generate", "12"]
    code, out, err = call("gpt2_pico.py", prompt, *flags, models_dir=folder)
    assert (code, err) == (0, "")
    assert out == expected(params, prompt, 12)


def test_both_stop_at_endoftext(models):
    """A model whose every logit but the end of text's is 0 there."""
    folder, params = models
    silent = weights.nest({n: np.zeros(s, np.float32) for n, s in weights.tensor_shapes(TINY)})
    silent["ln_f"]["b"] += 1
    silent["wte"][-1] += 1
    utils.save_model(folder / "silent", Encoder([]), TINY, silent)
    for script in ("gpt2.py", "gpt2_pico.py"):
        done = call(script, "Once", "--model_size", "silent", models_dir=folder)
        assert done == (0, "\n", "")


def test_an_empty_prompt_needs_a_tokenizer_with_an_end_of_text(models):
    folder, params = models
    vocab = Encoder([]).vocab
    vocab.pop("<|endoftext|>")
    hparams = TINY | {"n_vocab": 256}
    cut = params | {"wte": params["wte"][:256]}
    utils.save_model(folder / "endless", Encoder([], vocab), hparams, cut)
    code, out, err = call("gpt2.py", "", "--model_size", "endless", models_dir=folder)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "no <|endoftext|>" in err


def test_sampling_flags_reach_the_sampler(models):
    folder, params = models
    sampling = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 7}
    flags = [f"--{name}={value}" for name, value in sampling.items()]
    flags += ["--model_size", "tiny", "--n_tokens_to_generate", "20"]
    code, out, err = call("gpt2.py", "Once", *flags, models_dir=folder)
    assert (code, out, err) == (0, expected(params, "Once", 20, **sampling), "")


def test_flags_left_out_mean_40_tokens_from_all_there_are(models):
    folder, params = models
    for flags, sampling in (
        ([], {}),
        (["--temperature=0.9", "--seed=3"], {"temperature": 0.9, "seed": 3}),
    ):
        code, out, err = call("gpt2.py", "Once", "--model_size", "tiny", *flags, models_dir=folder)
        assert (code, out, err) == (0, expected(params, "Once", 40, **sampling), "")


@pytest.mark.parametrize("script", ["gpt2.py", "kv_cache.py"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"], ids=repr)
def test_a_file_can_be_the_prompt(models, tmp_path, script, end):
    folder, params = models
    path = tmp_path / "prompt.txt"
    path.write_bytes(f"One,\r\ntwo\n\nthree{end}".encode())
    flags = ["--model_size", "tiny", "--n_tokens_to_generate", "12"]
    wanted = 0, expected(params, "One,\ntwo\n\nthree", 12), ""
    assert call(script, *flags, "--prompt_file", path, models_dir=folder) == wanted
    data = path.read_bytes()
    assert call(script, *flags, "--prompt_file=-", models_dir=folder, input=data) == wanted


def test_a_prompt_and_a_file_exclude_each_other(models, tmp_path):
    for words in (["a", "--prompt_file", tmp_path / "x"], []):
        code, out, err = call("gpt2.py", *words, "--model_size", "tiny", models_dir=models[0])
        assert (code, out) == (2, "") and err.startswith("error: expected one prompt: ")
    code, _, err = call("gpt2.py", "--prompt_file", tmp_path / "x", models_dir=models[0])
    assert code == 2 and err == f"error: {tmp_path / 'x'}: No such file or directory\n"


def test_a_prompt_in_nanogpts_way_is_text_and_names_the_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert terminal.find_prompt("FILE:a.txt", None) == "FILE:a.txt"
    assert terminal.find_prompts(["b", "FILE:a.txt"], None, False) == ["b", "FILE:a.txt"]
    said = "notice: this prompt is the text FILE:a.txt; to continue that file: --prompt_file a.txt"
    assert capsys.readouterr().err == 2 * f"{said}\n"


def test_a_text_that_is_too_long_names_the_flag_that_allows_it(models):
    long, words = "x" * 60, ["--model_size", "tiny"]
    for script, prompt in (("gpt2.py", long), ("kv_cache.py", long), ("gpt2.py", "x" * 9999)):
        code, out, err = call(script, prompt, *words, models_dir=models[0])
        assert (code, out) == (2, "")
        assert err.endswith("48 positions (n_ctx); --slide continues beyond them\n")
    _, _, err = call("gpt2_pico.py", "x" * 9999, *words, models_dir=models[0])  # it cannot slide
    assert "positions (n_ctx)" in err and "--slide" not in err


def test_prompt_and_new_tokens_may_fill_the_context_exactly(models):
    folder, params = models
    flags = ["--model_size", "tiny", "--n_tokens_to_generate", "44"]
    assert call("gpt2.py", "Once", *flags, models_dir=folder)[1] == expected(params, "Once", 44)


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
    "an unknown flag": (["Once", "--temprature", "1"], "--temprature: did you mean --temperature?"),
    "no prompt": ([], "prompt"),
    "a longer prompt": (["x" * 9999], "9999 characters, but this model has only 48 positions"),
    "an unknown model": (["Once", "--model_size", "huge"], "no model 'huge'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_ends_in_one_line_and_exit_code_2(models, case):
    args, words = BAD[case]
    size = [] if "--model_size" in args else ["--model_size", "tiny"]
    code, out, err = call("gpt2.py", *args, *size, models_dir=models[0])
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_pico_refuses_what_does_not_fit(models):
    code, out, err = call("gpt2_pico.py", "x" * 40, "--model_size", "tiny", models_dir=models[0])
    assert (code, out) == (2, "") and err.count("\n") == 1 and "n_ctx 48" in err


def test_a_text_slides_beyond_the_context_if_asked_to(models):
    folder, params = models
    flags = ["--model_size", "tiny", "--n_tokens_to_generate", "100", "--slide"]
    texts = {prompt: expected(params, prompt * 60, 100, slide=True) for prompt in "abcdefgh"}
    prompt, text = max(texts.items(), key=lambda item: len(item[1]))  # any one may end at once
    assert call("gpt2.py", prompt * 60, *flags, models_dir=folder) == (0, text, "")
    assert len(text.encode("utf-8", "replace")) > 50


def test_flags_that_change_nothing_are_said_on_a_terminal(models, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for how, words in (
        ({"top_k": 5}, "notice: top_k, top_p and min_p change nothing at temperature 0"),
        ({"top_p": 0.5}, "notice: top_k, top_p and min_p change nothing at temperature 0"),
        ({"top_k": 5, "temperature": 1.0}, ""),
        ({"seed": 3}, ""),
    ):
        gpt2.main("a", 1, "tiny", str(models[0]), **how)
        err = capsys.readouterr().err
        assert err.startswith(words) and err.count("\n") == bool(words)


@pytest.mark.parametrize("weight", [np.nan, 1e38])
@pytest.mark.parametrize(
    "line",
    [
        "gpt2.py Once",
        "gpt2_pico.py Once",
        "kv_cache.py Once",
        "kv_cache.py Once --jsonl --n_samples 12",
        "evaluate.py perplexity --data text.txt",
        "explain.py Once --out page.html",
    ],
)
def test_damaged_weights_are_one_line_without_warnings(models, tmp_path, line, weight):
    broken = tree_map(lambda x: np.sign(x) * np.float32(weight), models[1])
    utils.save_model(models[0] / "broken", Encoder([]), TINY, broken)
    (tmp_path / "text.txt").write_text("some text " * 40)
    args = [*line.split(), "--model_size", "broken"]
    code, out, err = call(*args, models_dir=models[0], cwd=tmp_path)
    assert (code, out) == (2, "") and "not finite" in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_without_a_network_one_line_names_the_model_that_needs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "has_tensorflow", lambda: True)
    monkeypatch.setenv("SIXTYGPT_DOWNLOAD_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    code, out, err = call("gpt2.py", "Once", models_dir=tmp_path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "--model_size shakespeare" in err
    assert os.listdir(tmp_path) == []


def test_text_appears_while_it_is_made_and_ctrl_c_ends_it_quietly(models):
    """A model big enough to be slow: its first words must come long before its last."""
    hparams = TINY | {"n_ctx": 1024, "n_embd": 256, "n_layer": 8}
    utils.save_model(models[0] / "slow", Encoder([]), hparams, exclaiming(hparams))
    flags = ["--model_size", "slow", "--n_tokens_to_generate", "1000"]
    command = [sys.executable, str(REPO / "gpt2.py"), "Once", *flags, "--models_dir", models[0]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(3) == b"!!!"
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
        "200",
        "--temperature",
        "0.8",
        "--seed",
        "1",
    ]
    code, out, err = run("gpt2.py", "ROMEO:", *flags, cwd="/")
    assert (code, err) == (0, "")
    words = out.replace("\n", " ").split()
    assert sum(word.strip(".,;:!?'").islower() for word in words) > 2 / 3 * len(words) > 15
    assert {"the", "and", "to", "I", "of", "you", "my", "that", "in", "is"} & set(words)


# What `make demo` does not install. A finder that knows none of it makes it so.
WITHOUT = """
import runpy, sys
HEAVY = "jax jaxlib optax tensorflow torch transformers matplotlib ray pyarrow zstandard"
HEAVY += " uvicorn starlette"

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
        ("prepare.py text.txt --out shards2 --ray auto", "pip install -r requirements/ray.txt"),
        ("prepare.py text.parquet --out shards3", "pip install pyarrow"),
        ("train_jax.py --data text.txt --out out", "pip install -r requirements/train.txt"),
        ("train_jax.py --help", None),
        ("train_jax.py --version", None),
        ("serve.py --model_size tiny", "pip install -r requirements/serve.txt"),
        ("serve.py --help", None),
        (
            "backprop.py --data text.txt --out ./out2 --n_steps 2 --n_embd 16 --n_ctx 16 "
            "--checkpoint_every 1",
            None,
        ),
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
        if "--help" in args:
            assert done.stdout == call(script, "--help")[1] != ""
        if script == "backprop.py":
            assert done.stdout.count("loss.png needs matplotlib: pip install") == 1
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.endswith(f"{wanted}\n")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["serve.py uvicorn serve", "train_jax.py optax train"])
def test_a_single_missing_package_is_said_in_one_line(script):
    script, name, file = script.split()
    code = re.sub(r'HEAVY = ".*"\nHEAVY \+= ".*"', f'HEAVY = "{name}"', WITHOUT)
    command = [sys.executable, "-c", code, str(REPO / script)]
    done = subprocess.run(command, capture_output=True, timeout=120, encoding="utf-8")
    wanted = f"error: No module named '{name}': pip install -r requirements/{file}.txt\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", wanted)
    assert subprocess.run([*command, "--help"], capture_output=True, timeout=120).returncode == 0
