"""Prompts from a command line: its words, the lines of a file, or lines typed one by one."""

import contextlib
import re
import sys

from plumbing.cli import one_line


def find_prompts(prompts, prompts_file, interactive):  # -> list of str, or None if they are typed
    """ValueError, one clear line, for no prompts, or if some come with --interactive."""
    given = prompts or prompts_file is not None
    if interactive and given:
        raise ValueError("--interactive reads its prompts as you type them: give no others")
    if interactive or not given and sys.stdin is not None and sys.stdin.isatty():
        return None
    prompts = [*prompts, *([] if prompts_file is None else read_lines(prompts_file))]
    if not prompts:
        raise ValueError("no prompts: give one or more, --prompts_file or --interactive")
    return prompts


def unescape(text):
    r"""Turns \n, \t and \\ into their characters, which are hard to type in a shell.

    >>> unescape(r"a\n\\n")
    'a\n\\n'
    """
    signs = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda found: signs[found[1]], text)


def read_lines(path):
    """The lines of a file, or of standard input for "-", without their ends or a first BOM."""
    if path == "-" and sys.stdin is None:
        raise ValueError("standard input is closed")
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as f:
        text = f.read().decode("utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def interact(write):
    """Calls write([line]) for each line typed, until there are no more. Ctrl-C ends one text.

    At the prompt, Ctrl-C ends the program. A line that cannot be continued gives an error of one
    line, and the next line can be typed.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (arrow keys edit the line, and find earlier ones)
    if sys.stdin is None:
        raise ValueError("standard input is closed")
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    ask = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(ask)
        except EOFError:
            if ask:
                print()
            return
        try:
            write([line])
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
