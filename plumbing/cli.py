"""Runs a function as a command line. Its parameters are the flags, and mistakes end in one line.

    run_cli(main)

Fire reads the flags. This file changes some of Fire's habits, and turns errors and signals into
exit codes.
"""

import ast
import contextlib
import functools
import inspect
import io
import os
import re
import signal
import sys
import types
import typing
import warnings
from collections import deque
from pathlib import Path

VERSION = "1.0"  # of all of sixtyGPT, for --version
# The only one-letter flags. A letter means the same in every command that has the flag.
SHORT = {
    "m": "model_size",
    "n": "n_tokens_to_generate",
    "o": "out",
    "s": "seed",
    "t": "temperature",
}
OTHER_NAMES = {  # {a flag's name in other programs: ours}, for suggestions
    "block_size": "n_ctx",
    "eval_interval": "eval_every",
    "gradient_accumulation_steps": "n_accumulate",
    "lr": "learning_rate",
    "max_iters": "n_steps",
    "max_length": "n_tokens_to_generate",
    "max_new_tokens": "n_tokens_to_generate",
    "max_steps": "n_steps",
    "max_tokens": "n_tokens_to_generate",
    "model": "model_size",
    "model_name": "model_size",
    "num_return_sequences": "n_samples",
    "num_samples": "n_samples",
    "out_dir": "out",
    "output_dir": "out",
    "start": "prompt",
    "warmup_iters": "n_warmup",
}
USERS_MISTAKES = (ValueError, OSError, ImportError, AssertionError, OverflowError, MemoryError)
FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)
# Any other empty value comes from a variable that was not set: `--api_key "$UNSET"`.
MAY_BE_EMPTY = {"prompt", "prompts", "text", "separator"}
TYPED = "\0"  # marks words that a person typed; argv cannot contain it, so it is unambiguous


def run_cli(main):
    """Runs `main` as a command line whose flags are its parameters, read by their annotations.

    `main` starts only after the whole line has been understood. The help leaves out the parameters
    in main.unlisted. USERS_MISTAKES end in one line on stderr and exit code 2, Ctrl-C in 130, and a
    closed pipe in 141.
    """
    if sys.stderr is None:  # it was closed, so progress bars would fail
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    # NumPy warns if weights are too large. We check the results that matter, so silence it.
    warnings.filterwarnings(
        "ignore", "(overflow|invalid value|divide by zero) encountered", RuntimeWarning
    )
    try:
        args, kwargs = read_arguments(main, sys.argv[1:])
        check_not_empty(inspect.signature(main).bind(*args, **kwargs).arguments)
        main(*args, **kwargs)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure can still be reported
        return
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141
    except USERS_MISTAKES as error:
        print(f"error: {one_line(error)}{advice(main, error)}", file=sys.stderr)
        code = 2
    with contextlib.suppress(AttributeError):  # there may be no stdout
        try:
            sys.stdout.flush()
        except OSError:  # otherwise Python would try again at exit, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def end_without_packages(missing, requirements, main):
    """Ends a script whose packages are missing, with its help if asked for, otherwise one line."""
    if {"-h", "--help", "--version"} & set(sys.argv[1:]):
        run_cli(main)
    print(f"error: {missing}: pip install -r {requirements}", file=sys.stderr)
    sys.exit(2)


def main_of(path):  # -> a function that does nothing, with the signature and the docstring
    """Returns a script's `main`, for its help. The script's imports need not be installed."""
    tree = ast.parse(Path(path).read_text("utf-8"))
    [main] = [node for node in tree.body if getattr(node, "name", "") == "main"]
    main.body = main.body[:1]  # the docstring
    names = {}
    exec(compile(ast.Module([main], []), path, "exec"), names)
    return names["main"]


def advice(main, error):  # -> words to append to an error's line, or ""
    """If a text is longer than the model's context, names the flag that allows it, if any."""
    is_too_long = str(error).endswith("positions (n_ctx)")
    has_slide = "slide" in inspect.signature(main).parameters
    return "; --slide continues beyond them" if is_too_long and has_slide else ""


def one_line(error):
    """Returns an error's message without `[Errno 30]`, as in "/x/y: Read-only file system".

    A message may quote a file, so long text is cut and control codes for terminals are escaped.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError) and "pip install" not in text:
        text += ": pip install -r requirements.txt"
    text = " ".join(text.splitlines()) or type(error).__name__
    text = text if len(text) <= 2000 else text[:1500] + " ... " + text[-500:]
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def notice(text):
    """Prints a message for people, and only if stderr is a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"notice: {text}", file=sys.stderr)


def read_arguments(main, argv):
    """Returns `main`'s (args, kwargs) from `argv`.

    Raises SystemExit(0) after printing the help or the version. Fire binds the arguments, with two
    of its habits tamed. It calls a function before it has looked at all flags, so here it calls a
    recorder. And it guesses types (`1984` would be an int), so every typed word is marked. Which
    flag a word means is decided by spell_out.
    """
    try:
        import fire
        from fire.decorators import SetParseFn
    except ImportError:
        raise ImportError("command lines need fire: pip install -r requirements.txt") from None

    calls = []

    @functools.wraps(main, updated=())  # fire would list main's attributes
    def record(*args, **kwargs):
        calls.append((args, kwargs))

    parameters = inspect.signature(main, eval_str=True).parameters
    help_wanted = {"-h", "--help"} & set(argv)
    if not help_wanted and "--version" in argv:
        print(f"sixtyGPT {VERSION}")
        sys.exit(0)
    for p in () if help_wanted else parameters.values():  # otherwise the help would list parsers
        names = () if p.kind is p.VAR_POSITIONAL else (p.name,)  # (): fire's default parser
        SetParseFn(functools.partial(parse, p.name, p.annotation), *names)(record)
    # "int | None" reads better in the help as fire's own "Optional[int]".
    unlisted = getattr(main, "unlisted", ()) if help_wanted else ()
    listed = [p for p in parameters.values() if p.name not in unlisted]
    plain = [p.replace(annotation=kinds(p.annotation)[0]) for p in listed]
    record.__signature__ = inspect.Signature(plain)

    printed = io.StringIO()
    command = ["--", "--help"] if help_wanted else spell_out(argv, parameters)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            fire.Fire(record, command=command)
    except fire.core.FireExit as stop:
        if not help_wanted:
            reason = stop.trace.elements[-1].ErrorAsStr().replace(TYPED, "")
            reason = reason.replace("Could not consume arg:", "one word too many:")
            raise ValueError(f"{reason} (--help lists the flags)") from None
        print(name_short_flags(printed.getvalue().strip()))
        raise
    return calls[0]


def check_not_empty(given):  # {parameter: its typed value}
    """Raises ValueError for an empty value of a parameter for which it makes no sense."""
    for name, value in given.items():
        values = value if isinstance(value, tuple) else (value,)
        if "" in values and name not in MAY_BE_EMPTY:
            raise ValueError(f"--{name} is empty; give it a value, or leave it out")


def spell_out(argv, parameters):  # -> the words for fire
    """Returns `argv` as UTF-8, with each flag's full name and value, and with typed words marked.

    A flag for True or False takes the next word only if it is one of the two. A flag that takes
    several values may be repeated. If any other flag is repeated, the last one counts.
    """
    words = deque(os.fsencode(word).decode("utf-8", "replace") for word in argv)
    texts, flags = [], {}
    while words:
        word = words.popleft()
        if not FLAG.fullmatch(word):
            texts.append(TYPED + word)
            continue
        typed, equals, value = word.partition("=")
        name, is_on = find_flag(typed, parameters)
        kind = kinds(parameters[name].annotation)[0]
        if kind is bool and not equals:
            spelt = words and words[0].lower() in ("true", "false")
            value = words.popleft() if spelt else str(is_on)
        elif not equals:
            if not words or FLAG.fullmatch(words[0]):
                raise ValueError(
                    f"{typed} needs a value (if it starts with a dash, write {typed}=-x)"
                )
            value = words.popleft()
        before = flags.get(name, "") if typing.get_origin(kind) is tuple else ""
        flags[name] = before + TYPED + value
    return texts + [f"--{name}={value}" for name, value in flags.items()]


def find_flag(typed, parameters):  # "-n", "--top-k" or "--nojsonl" -> (name, False after a "no")
    """Returns the parameter that a flag names. Raises ValueError, with similar names, for none."""
    names = [p.name for p in parameters.values() if p.kind is not p.VAR_POSITIONAL]
    name = typed.lstrip("-").replace("-", "_")
    if SHORT.get(name) in names:
        name = SHORT[name]
    if name in names:
        return name, True
    if name.startswith("no") and name[2:] in names and parameters[name[2:]].annotation is bool:
        return name[2:], False
    ours = OTHER_NAMES.get(name)
    hint = did_you_mean(name, names, "--")
    if ours in names:
        hint = f": did you mean --{ours}?"
    elif ours and not hint:
        hint = f": only other commands have --{ours}"
    raise ValueError(f"no flag {typed}{hint} (--help lists them all)")


def did_you_mean(word, names, prefix=""):  # -> ": did you mean this or that?", or ""
    """Suggests at most two names that contain the word or, if none does, are similar to it.

    If the word is a single letter, suggests names that begin with it.
    """
    import difflib

    if len(word) == 1:
        alike = [n for n in names if n.startswith(word)]
    else:
        alike = [n for n in names if word.lower() in n.lower()]
    found = (alike or difflib.get_close_matches(word, names))[:2]
    return f": did you mean {either(found, prefix)}?" if found else ""


def count(n, noun):  # 1, "token" -> "1 token"; 2, "token" -> "2 tokens"
    return f"{n} {noun}" + ("" if n == 1 else "s")


def either(names, prefix=""):  # ["a", "b"] -> "a or b"
    return " or ".join(prefix + name for name in names)


def name_short_flags(text):  # fire's help -> the help
    """Shows the letters of SHORT. Fire shows a letter whenever only one flag begins with it."""
    text = re.sub(r"^( +)-\w, --", r"\1--", text, flags=re.MULTILINE)
    for letter, name in SHORT.items():
        text = re.sub(rf"^( +)--{name}=", rf"\1-{letter}, --{name}=", text, flags=re.MULTILINE)
    return text


def kinds(annotation):
    """Turns `int | None` into [int, None's type], and `int` into [int]."""
    some = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else [annotation]
    return sorted(some, key=lambda a: a is type(None))


def parse(name, annotation, word):
    """Converts one argument to the type of its annotation. A ValueError names the flag."""
    kind = kinds(annotation)[0]
    text = word.removeprefix(TYPED)
    if typing.get_origin(kind) is tuple:
        return tuple(text.split(TYPED))
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in (int, float) and type(None) in kinds(annotation) and text.lower() == "none":
        return None
    wanted = {int: "a whole number", float: "a number", bool: "True or False"}.get(kind)
    try:
        return text if wanted is None else {int: int, float: float}[kind](text)
    except (ValueError, KeyError):
        raise ValueError(f"--{name}: expected {wanted}, got {text!r}") from None


@contextlib.contextmanager
def note_signals():
    """Inside, the first signal to end only adds its number to the list. A second one acts.

    The signals are Ctrl-C, SIGTERM and, unless nohup ignores it, a closed terminal's SIGHUP.
    """
    caught = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(int(number))

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
