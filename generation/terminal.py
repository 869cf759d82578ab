"""The terminal: prompts from the command line, files or typed lines, and texts as they come.

Texts come as the Events of generate_stream, NumPy's or JAX's.
"""

import contextlib
import json
import re
import sys

from corpus.chat import NEXT_TURN, encode_conversation
from generation.stops import up_to
from plumbing.cli import notice, one_line

# --- Prompts --------------------------------------------------------------------------------------


def find_prompts(prompts, prompts_file, interactive, prompt_file=None):
    """-> list of str, or None if they are typed.

    Raises ValueError for no prompts, or if some come with --interactive.
    """
    for prompt in prompts:
        suggest_file(prompt)
    if prompt_file is not None:
        prompts = [*prompts, read_prompt(prompt_file)]
    given = prompts or prompts_file is not None
    if interactive and given:
        raise ValueError("--interactive reads prompts as you type them, so give no others")
    if interactive or not given and sys.stdin is not None and sys.stdin.isatty():
        return None
    prompts = [*prompts, *([] if prompts_file is None else read_lines(prompts_file))]
    if not prompts:
        raise ValueError("no prompts; give one or more, --prompts_file or --interactive")
    return prompts


def find_prompt(prompt, prompt_file):  # the two flags, of which one is given -> str
    """Raises ValueError if none or both are given."""
    if (prompt is None) == (prompt_file is None):
        raise ValueError("expected one prompt: the text, or --prompt_file with its file")
    if prompt_file is not None:
        return read_prompt(prompt_file)
    suggest_file(prompt)
    return prompt


def suggest_file(prompt):
    """nanoGPT reads the file of a prompt FILE:name. Here any prompt is text."""
    if prompt.startswith("FILE:"):
        path = prompt.removeprefix("FILE:")
        notice(f"this prompt is the text {prompt}; to continue that file: --prompt_file {path}")


def read_prompt(path):
    """A whole file, or standard input for "-", without a first BOM and the end of its last line."""
    return "\n".join(read_lines(path))


def read_lines(path):
    """The lines of a file, or of standard input for "-", without their ends or a first BOM."""
    if path == "-" and sys.stdin is None:
        raise ValueError("standard input is closed")
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as f:
        text = f.read().decode("utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def encode_prompts(prompts, encoder, n_ctx):  # list of str -> list of id lists
    """Raises ValueError, which says which prompt is too long."""
    batch = []
    for i, prompt in enumerate(prompts, 1):
        try:
            batch.append(encoder.encode_prompt(prompt, n_ctx))
        except ValueError as error:
            raise ValueError(f"prompt {i} of {len(prompts)}: {error}") from None
    return batch


def read_stops(stops, chat):  # the --stop flags -> the strings that end a text
    """In a chat the user's next turn is another."""
    stops = [unescape(text) for text in stops]
    return [*stops, NEXT_TURN] if chat else stops


def unescape(text):
    r"""Turns \n, \t and \\ into their characters, which are hard to type in a shell.

    >>> unescape(r"a\n\\n")
    'a\n\\n'
    """
    signs = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda found: signs[found[1]], text)


# --- Typed lines, and conversations ---------------------------------------------------------------


def interact(answer):
    """Calls answer([line]) for each line typed, until there are no more. Ctrl-C ends one text.

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
            line = input(ask).removesuffix("\r")  # as in a file from Windows
        except EOFError:
            if ask:
                print()
            return
        try:
            answer([line])
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)


def check_chat(**asked):  # {a flag that excludes --chat: was it given?}
    if given := [name for name, is_asked in asked.items() if is_asked]:
        raise ValueError(f"--chat gives one answer to each line, so leave out --{given[0]}")


def converse(answer, encoder, n_ctx, n_tokens=None):  # -> a function of [line], for interact
    """Each line is a user's message. The answer is printed; message and answer are remembered.

    answer(ids, n): the text of an answer of at most n tokens, in parts. n is n_tokens or, if that
    is None, what the conversation leaves of the context, which is a quarter at least. If Ctrl-C
    stops an answer, the part before counts as the whole. The function raises ValueError for a line
    that is too long, which is then forgotten.
    """
    messages = []
    n_reserved = max(1, n_ctx // 4) if n_tokens is None else n_tokens

    def say(lines):
        asked = [*messages, {"role": "user", "content": lines[0]}]
        ids = encode_conversation(asked, encoder, n_ctx - n_reserved)
        messages[:] = asked
        said = ""
        try:
            for text in answer(ids, n_ctx - len(ids) if n_tokens is None else n_tokens):
                text = text if said else text.lstrip()  # drops the space after "Assistant:"
                print(text, end="", flush=True)
                said += text
            print()
        finally:
            messages.append({"role": "assistant", "content": said})

    return say


# --- Printing -------------------------------------------------------------------------------------


def texts_of(events, encoder, stops):  # of one row -> its text in parts, as it is made
    new_ids = (event.token for event in events if event.token is not None)
    return up_to(encoder.decode_stream(new_ids), stops)


def print_stream(events, before, encoder, stops):
    """Prints the one row's text as it is made, after the text `before`."""
    for text in texts_of(events, encoder, stops):
        print(before + text, end="", flush=True)
        before = ""
    print()


def print_rows(
    events, prompts, n_samples, n_tokens_to_generate, encoder, stops, jsonl, bar, echo=False
):
    """Prints each row once it and all rows before it are complete; on Ctrl-C, all text so far."""
    from tqdm import tqdm

    def show(row, ids, end):
        index, sample = divmod(row, n_samples)
        prompt = prompts[index]
        text = "".join(up_to([encoder.decode(ids)], stops))
        if echo:
            text = prompt + text
        if jsonl:
            entry = {"prompt": prompt, "text": text, "ids": ids, "stop": end}
            entry |= {"index": index, "sample": sample}
            line = json.dumps(entry, ensure_ascii=False)
        else:
            title = json.dumps(prompt, ensure_ascii=False)
            if n_samples > 1:
                title += f" (sample {sample + 1} of {n_samples})"
            line = f"==> {title} <==\n{text}\n"
        tqdm.write(line, file=sys.stdout)

    begun = {}  # {row: its ids}
    ends = {}  # {row: why it ended}
    n_shown = 0
    n_rows = len(prompts) * n_samples
    total = n_rows * n_tokens_to_generate
    with tqdm(total=total, unit="token", disable=None if bar else True) as progress:
        try:
            for row, token, end in events:
                ids = begun.setdefault(row, [])
                if token is not None:
                    ids.append(token)
                    progress.update(1)
                if end:
                    ends[row] = end
                    progress.total -= n_tokens_to_generate - len(ids)  # it may have ended early
                while n_shown in ends:
                    show(n_shown, begun.pop(n_shown), ends.pop(n_shown))
                    n_shown += 1
        except KeyboardInterrupt:
            for row, ids in sorted(begun.items()):
                show(row, ids, ends.get(row, "interrupted"))
            raise
