"""Command lines: a function's parameters are its flags, and a mistake ends in one line.

    run_cli(main)

Fire reads the flags; what is here tames it, and turns errors and signals into exit codes.
"""

import contextlib
import functools
import inspect
import io
import os
import re
import signal
import sys
import typing

USERS_MISTAKES = (ValueError, OSError, ImportError, AssertionError, OverflowError, MemoryError)
FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)
TYPED = "\0"  # marks what a person typed: argv cannot contain it, so nothing else looks like it


def run_cli(main):
    """Run `main` as a command line whose flags are its parameters, read by their annotations.

    `main` starts only once the whole line is understood. USERS_MISTAKES end in one line on stderr
    and exit code 2, Ctrl-C in 130, a closed pipe in 141.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        args, kwargs = read_arguments(main, sys.argv[1:])
        main(*args, **kwargs)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure can still be reported
        return
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141
    except USERS_MISTAKES as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = 2
    with contextlib.suppress(AttributeError):  # there may be no stdout
        try:
            sys.stdout.flush()
        except OSError:  # Python would try, and complain, once more on its way out
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def one_line(error):
    """What went wrong, without `[Errno 30]`: "/x/y: Read-only file system".

    What a message repeats of a file may be long, or be meant for the terminal: neither is shown.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError) and "pip install" not in text:
        text += ": pip install -r requirements.txt"
    text = " ".join(text.splitlines()) or type(error).__name__
    text = text if len(text) <= 2000 else text[:1500] + " ... " + text[-500:]
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def read_arguments(main, argv):
    """`main`'s (args, kwargs) from `argv`, or SystemExit(0) after printing the help.

    Fire binds them, with three of its habits tamed: it calls a function before it has looked at
    all flags (here it calls a recorder), guesses types (`1984` would be an int) and gives `-` and
    `--` meanings of its own. Marking every typed word hides it from the last two.
    """
    try:
        import fire
        from fire.decorators import SetParseFn
    except ImportError:
        raise ImportError("command lines need fire: pip install -r requirements.txt") from None

    calls = []

    @functools.wraps(main)
    def record(*args, **kwargs):
        calls.append((args, kwargs))

    parameters = inspect.signature(main, eval_str=True).parameters.values()
    help_wanted = {"-h", "--help"} & set(argv)
    for p in () if help_wanted else parameters:  # the help would list what this adds
        names = () if p.kind is p.VAR_POSITIONAL else (p.name,)  # (): fire's default parser
        SetParseFn(functools.partial(parse, p.name, p.annotation), *names)(record)
    # "int | None" reads better in the help as fire's own "Optional[int]".
    plain = [p.replace(annotation=kinds(p.annotation)[0]) for p in parameters]
    record.__signature__ = inspect.Signature(plain)

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            fire.Fire(record, command=["--", "--help"] if help_wanted else mark(argv))
    except fire.core.FireExit as stop:
        if not help_wanted:
            reason = stop.trace.elements[-1].ErrorAsStr().replace(TYPED, "")
            raise ValueError(f"{reason} (--help lists what there is)") from None
        print(printed.getvalue().strip())
        raise
    return calls[0]


def mark(argv):
    """`argv` as UTF-8 text, with everything marked but the flags' names."""
    words = (os.fsencode(word).decode("utf-8", "replace") for word in argv)
    return [w.replace("=", "=" + TYPED, 1) if FLAG.fullmatch(w) else TYPED + w for w in words]


def kinds(annotation):
    """`int | None` -> [int, None's type]; `int` -> [int]."""
    return sorted(typing.get_args(annotation) or [annotation], key=lambda a: a is type(None))


def parse(name, annotation, word):
    """One argument as its annotation says; ValueError names the flag."""
    kind = kinds(annotation)[0]
    text = word.removeprefix(TYPED)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text == word:  # nobody typed this: it is fire's own "True" for a flag without a value
        raise ValueError(f"--{name}: expected a value (one that starts with a dash: --{name}=-x)")
    if kind in (int, float) and type(None) in kinds(annotation) and text.lower() == "none":
        return None
    wanted = {int: "a whole number", float: "a number", bool: "True or False"}.get(kind)
    try:
        return text if wanted is None else {int: int, float: float}[kind](text)
    except (ValueError, KeyError):
        raise ValueError(f"--{name}: expected {wanted}, got {text!r}") from None


@contextlib.contextmanager
def note_signals():
    """Inside, the first Ctrl-C or SIGTERM only adds its number to the list; a second one acts."""
    caught = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(int(number))

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
