"""Learning from examples: what is learned of them, that none sees another, and whole runs."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import TINY, call, call_trainer, hugging_face, random_params, slow

from corpus.chat import (
    CHAT_TEMPLATE,
    NEXT_TURN,
    check_messages,
    encode_conversation,
    encode_messages,
)
from corpus.examples import (
    BEGINS,
    FIRST_RULES,
    READ,
    RULES,
    hold_out,
    is_learned,
    load_examples,
    mark,
    pack,
    thin,
)
from encoder import ENDOFTEXT, Encoder, get_encoder, train
from generation.terminal import converse
from gpt2 import generate
from training.text import open_text

jax = pytest.importorskip("jax", reason="jax is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("optax", reason="optax is not installed")
import jax.numpy as jnp  # noqa: E402

import train_jax  # noqa: E402
import training.text  # noqa: E402
from training import batches, devices  # noqa: E402

HPARAMS = {"n_vocab": 257, "n_ctx": 32, "n_embd": 24, "n_head": 3, "n_layer": 2}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hello, who are you?\n"},
    {"role": "assistant", "content": "Nobody."},
    {"role": "user", "content": "And I?"},
    {"role": "assistant", "content": "'tis you who asks"},
]
AS_TEXT = (
    "System: Be brief.\nUser: Hello, who are you?\nAssistant:[ Nobody.<|endoftext|>]\n"
    "User: And I?\nAssistant:[ 'tis you who asks<|endoftext|>]"
)
words = train("User: Assistant: hello who are you and I nobody 'tis you who asks. " * 9, 300)


def write(path, *lines):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return str(path)


def load(path, *lines, n_most=999, encoder=None, **rules):  # -> examples, a line for people
    return load_examples(write(path, *lines), encoder or Encoder([]), n_most, **rules)[:2]


def show(example, encoder):  # a marked example -> its text, what is learned in brackets
    text, before = "", False
    for token in example:
        learned = bool(is_learned(token))
        text += "[" * (learned > before) + "]" * (learned < before)
        before = learned
        text += encoder.decode([int(token) & (READ - 1)])
    return text + "]" * before


# --- What an example is --------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [Encoder([]), words], ids=["bytes", "words"])
def test_completions_and_answers_are_learned_and_nothing_else(tmp_path, encoder):
    asked = {"prompt": "2+2=", "completion": "4"}
    free = {"prompt": "", "completion": "once"}
    examples, said = load(
        tmp_path / "a.jsonl", asked, "", {"messages": TALK}, free, encoder=encoder
    )
    shown = [show(example, encoder) for example in examples]
    assert shown == [f"2+2=[4{ENDOFTEXT}]", AS_TEXT, f"{ENDOFTEXT}[once{ENDOFTEXT}]"]
    assert said == "3 examples"
    for example in examples:
        assert example.dtype == np.int32 and (example & BEGINS > 0).tolist().index(True) == 0
        assert (example & BEGINS > 0).sum() == 1


def test_a_conversation_has_the_ids_that_transformers_gives_the_template(tmp_path):
    """Written again for transformers, in its own language, with its own mask of the answers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    words.save(tmp_path)
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '\n' if loop.index > 1 }}"
        "{% if m.role == 'assistant' %}Assistant:"
        "{% generation %} {{ m.content | trim }}<|endoftext|>{% endgeneration %}"
        "{% else %}{{ m.role | capitalize }}: {{ m.content | trim }}{% endif %}{% endfor %}"
    )
    wanted = tokenizer.apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    example = mark(encode_messages(TALK, words), 999)
    assert (example & (READ - 1)).tolist() == wanted["input_ids"]
    assert is_learned(example).tolist() == list(map(bool, wanted["assistant_masks"]))


OPENAI_TEMPLATE = """
{%- for m in messages %}
    {%- set text %}{% if m.content is string %}{{ m.content }}{% else %}
        {%- for part in m.content or [] %}{{ part.text }}{% endfor %}
    {%- endif %}{% endset %}
    {{- '\n' if loop.index > 1 }}
    {%- if m.role != 'assistant' %}
        {{- 'User' if m.role == 'user' else 'System' }}: {{ text | trim }}
    {%- elif m.weight == 0 or not text | trim %}
        {{- 'Assistant: ' + text | trim }}<|endoftext|>
    {%- else %}
        {{- 'Assistant:' }}
        {%- generation %}{{ ' ' + text | trim }}<|endoftext|>{% endgeneration %}
    {%- endif %}
{%- endfor %}"""


def random_message(rng):  # of OpenAI's finetuning, in all of its forms
    role = str(rng.choice(["user", "assistant", "assistant", "system", "developer"]))
    texts = rng.choice(["hello", " who are you", "\n", "", "é?", "'tis you who asks "], 3).tolist()
    message = {"role": role, "content": texts[0]}
    if rng.random() < 0.4:
        message["content"] = [{"type": "text", "text": text} for text in texts]
    if role == "assistant" and rng.random() < 0.5:
        message["weight"] = int(rng.integers(2))
    if role == "assistant" and rng.random() < 0.1:
        message["content"] = None
    return message


def test_openais_messages_have_the_ids_and_the_mask_of_a_template_of_transformers(rng, tmp_path):
    """Weights of 0, empty answers, developers, lists of text parts: written again in Jinja."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    words.save(tmp_path)
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    n_learned = n_read = 0
    for _ in range(60):
        messages = [random_message(rng) for _ in range(rng.integers(1, 7))]
        wanted = tokenizer.apply_chat_template(
            messages,
            chat_template=OPENAI_TEMPLATE,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = wanted["input_ids"], list(map(bool, wanted["assistant_masks"]))
        if messages[-1]["role"] != "assistant":
            newline = words.encode("\n")
            ids, mask = [*ids, *newline], [*mask, *[False for _ in newline]]
        parts = encode_messages(check_messages(messages), words)
        example = mark(parts, 999)
        assert (example & (READ - 1)).tolist() == ids
        assert is_learned(example).tolist() == mask
        examples, said = load(tmp_path / "a.jsonl", {"messages": messages}, encoder=words)
        if any(mask):
            assert (examples[0] == example).all()
            is_empty = [m["role"] == "assistant" and not joined(m).strip() for m in messages]
            assert (said == "1 example, 1 with an empty answer, which is not learned") == any(
                is_empty
            )
        else:
            assert said == "0 examples, 1 left out with nothing to learn"
        n_learned += any(mask)
        n_read += not any(mask)
    assert n_learned > 9 and n_read > 2


def joined(message):
    content = message["content"] or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


USER = {"role": "user", "content": "Hi"}
NOT_TEXT = {
    "message 2 has tool_calls, which are not supported": {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    },
    "message 2 has function_call, which are not supported": {
        "messages": [USER, {"role": "assistant", "content": "", "function_call": {"name": "f"}}]
    },
    "message 1: role is 'tool', not system, user, assistant": {
        "messages": [{"role": "tool", "content": "4", "tool_call_id": "1"}]
    },
    "message 1 has no content that is text": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}
        ]
    },
    "message 2: weight is 0.5, not 0 or 1": {
        "messages": [USER, {"role": "assistant", "content": "Ho", "weight": 0.5}]
    },
    "tools are not supported; leave them out": {"messages": TALK, "tools": [{"type": "function"}]},
    "functions are not supported; leave them out": {"messages": TALK, "functions": [{"name": "f"}]},
    "expected a prompt and a completion, both text, or messages": {
        "prompt": [USER], "completion": TALK[2:3],
    },
}  # fmt: skip


@pytest.mark.parametrize("problem", NOT_TEXT)
def test_what_is_not_text_is_refused(tmp_path, problem):
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: {problem}$"):
        load(tmp_path / "a.jsonl", {"messages": TALK}, NOT_TEXT[problem])
    calls = {"tool_calls": [], "function_call": None}  # as some programs write them
    load(tmp_path / "a.jsonl", {"messages": [m | calls for m in TALK], "tools": []})


@pytest.mark.parametrize("end", [ENDOFTEXT, "</s>"])
def test_the_template_of_an_export_renders_the_ids_that_are_learned(tmp_path, end):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    special = {ENDOFTEXT: words.endoftext, "</s>": words.n_vocab}
    encoder = Encoder(words.merges, words.vocab, special, [special[end]])
    path = write(tmp_path / "a.jsonl", *2 * [{"messages": TALK}])
    (example, _), *_ = load_examples(path, encoder, 999)
    open_text(path, encoder, 999).encoder.save(tmp_path / "m")
    assert encoder.chat_template is None
    again = get_encoder("m", tmp_path)
    again.save(tmp_path / "again")
    for folder in ("m", "again"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        rendered = tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]
        assert rendered == (example & (READ - 1)).tolist()
        for n in range(1, len(TALK) + 1):
            prompt = tokenizer.apply_chat_template(
                TALK[:n], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            assert prompt == encode_conversation(TALK[:n], encoder, 999)


def test_models_of_prompts_and_completions_get_no_chat_template(tmp_path):
    path = write(tmp_path / "a.jsonl", *2 * [{"prompt": "a", "completion": "b"}])
    open_text(path, None, 9).encoder.save(tmp_path)
    assert "chat_template" not in (tmp_path / "tokenizer_config.json").read_text()


def test_a_prompt_and_its_completion_share_no_token(tmp_path):
    """Where they would as one text, they are encoded apart, and it is said."""
    encoder = Encoder([("a", "b")])
    lines = [{"prompt": "a", "completion": "b"}, {"prompt": "b", "completion": "ab"}]
    examples, said = load(tmp_path / "a.jsonl", *lines, encoder=encoder)
    ab = encoder.encode("ab")
    assert len(ab) == 1 and encoder.encode("a") + encoder.encode("b") != ab
    assert show(examples[0], encoder) == f"a[b{ENDOFTEXT}]" and len(examples[0]) == 3
    assert said == "2 examples, 1 whose completion would have merged with the prompt"


LONG = [
    ("0123456789", "yes", f"6789[yes{ENDOFTEXT}]"),
    ("0", "no", f"0[no{ENDOFTEXT}]"),
    ("0", "abcdefghij", "0[abcdefg]"),
    ("012345", "abcdefghij", "012345[ab]"),  # what the prompt leaves, but a quarter at least
    ("0123456789", "abcdefghij", "456789[ab]"),
    ("0", "abcdef", f"0[abcdef{ENDOFTEXT}]"),
    ("0123456789", "abcdef", f"9[abcdef{ENDOFTEXT}]"),  # of 7 ids, the most that fit
    ("0123456789", "abcdefg", "456789[ab]"),
]


def test_a_prompt_that_is_too_long_loses_its_beginning_and_a_completion_its_end(tmp_path):
    lines = [{"prompt": prompt, "completion": completion} for prompt, completion, _ in LONG]
    lines += [{"prompt": "0", "completion": ""}, {"messages": TALK[:2]}]
    examples, said = load(tmp_path / "a.jsonl", *lines, n_most=8)
    shown = [show(example, Encoder([])) for example in examples]
    assert shown == [wanted for _, _, wanted in LONG]
    assert said == (
        "8 examples, 4 cut on the left to fit, 4 cut at the end to fit, "
        "2 left out with nothing to learn"
    )
    assert all(example[0] & (READ | BEGINS) == READ | BEGINS for example in examples)


def random_talk(rng):  # ends with a user's message and the answer to it
    roles = rng.choice(["user", "assistant"], rng.integers(9), p=[0.6, 0.4]).tolist()
    roles = ["system"] * int(rng.integers(2)) + [*roles, "user", "assistant"]
    return [{"role": role, "content": "x" * rng.integers(1, 9)} for role in roles]


def n_ids(messages):
    return sum(len(ids) for ids, _ in encode_messages(messages, Encoder([])))


def test_a_conversation_that_is_too_long_forgets_what_a_chat_forgets(rng, tmp_path):
    """Its last answer comes after the prompt for which the server would write one as long."""
    n_forgotten = 0
    for _ in range(60):
        talk = random_talk(rng)
        n_answer = len(f" {talk[-1]['content']}") + 1
        shortest = talk[: talk[0]["role"] == "system"] + talk[-2:]
        n_most = int(rng.integers(n_ids(shortest), n_ids(talk) + 2))
        trailing = int(rng.integers(2)) * [{"role": "user", "content": "nothing is learned of it"}]
        row = {"messages": talk + trailing}
        [example], said = load(tmp_path / "a.jsonl", row, n_most=n_most)
        prompt = encode_conversation(talk[:-1], Encoder([]), n_most - n_answer)
        ids = (example & (READ - 1)).tolist()
        assert ids[:-n_answer] == prompt and len(ids) <= n_most
        assert is_learned(example[-n_answer:]).all()
        is_forgotten = len(ids) < n_ids(talk)
        n_forgotten += is_forgotten
        assert (said == "1 example, 1 without the oldest messages, to fit") == is_forgotten
    assert 9 < n_forgotten < 60


def test_a_conversation_whose_last_answer_is_too_long_keeps_the_answers_beginning(tmp_path):
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "U"}
    talk = [system, user, {"role": "assistant", "content": "A"}, user]
    talk.append({"role": "assistant", "content": "abcdefghij" * 9})
    [example], said = load(tmp_path / "a.jsonl", {"messages": talk}, n_most=40)
    start = "System: S\nUser: U\nAssistant:"
    assert show(example, Encoder([])) == f"{start}[ {talk[-1]['content'][: 39 - len(start)]}]"
    assert said == "1 example, 1 cut at the end to fit, 1 without the oldest messages, to fit"


def test_a_last_message_that_is_too_long_loses_its_beginning(tmp_path):
    talk = [{"role": "user", "content": "0123456789" * 9}, {"role": "assistant", "content": "yes"}]
    [example], said = load(tmp_path / "a.jsonl", {"messages": talk}, n_most=20)
    assert show(example, Encoder([])) == f"6789\nAssistant:[ yes{ENDOFTEXT}]"
    assert said == "1 example, 1 cut on the left to fit"


BAD = {
    "{": "not JSON",
    "[1]": "not a JSON object",
    '{"prompt": "x"}': "expected a prompt and a completion, both text, or messages",
    '{"prompt": "x", "completion": 4}': "expected a prompt and a completion, both text",
    '{"text": "x"}': "expected a prompt and a completion",
    '{"messages": {}}': "messages is not a list of messages",
    '{"messages": []}': "messages is not a list of messages",
    '{"messages": [7]}': "message 1 has no content that is text",
    '{"messages": [{"role": "user"}]}': "message 1 has no content that is text",
    '{"messages": [{"role": "user", "content": ["x"]}]}': "message 1 has no content that is text",
    '{"messages": [{"role": "user", "content": ""}, {"role": "tool", "content": ""}]}': (
        "message 2: role is 'tool', not system, user, assistant"
    ),
    '{"messages": [{"role": ["user"], "content": ""}]}': "message 1: role is ['user'], not system",
    "\xff": "not JSON",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named(tmp_path, line):
    good = json.dumps({"prompt": "a", "completion": "b"})
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{good}\n\n".encode() + line.encode("latin-1") + f"\n{good}\n".encode())
    code, _, complaint = call_trainer("--data", path, "--out", tmp_path / "out")
    assert code == 2 and complaint.count("\n") == 1
    assert complaint.startswith(f"error: {path}, line 3: {BAD[line]}")
    assert not (tmp_path / "out").exists()


def test_too_few_examples_and_the_other_trainer(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    code, _, complaint = call_trainer("--data", path, "--out", tmp_path / "out")
    assert code == 2 and complaint.startswith(f"error: {path}: 1 example: at least 2 are needed")
    code, _, complaint = call("backprop.py", "--data", path, "--out", tmp_path / "out")
    wanted = f"error: backprop.py doesn't learn from examples (--data {path}); use train_jax.py\n"
    assert (code, complaint) == (2, wanted)
    os.mkfifo(tmp_path / "pipe.jsonl")  # which would have us wait
    code, _, complaint = call_trainer("--data", tmp_path / "pipe.jsonl", "--out", tmp_path / "out")
    assert (code, complaint) == (2, f"error: {tmp_path}/pipe.jsonl: not an ordinary file\n")


# --- Conversations that go on --------------------------------------------------------------------


def test_a_conversation_is_read_as_it_was_learned():
    """The ids before each answer of an example are those that an answer is asked for with."""
    parts = encode_messages(TALK, words)
    ids = [id for part, _ in parts for id in part]
    n = len(parts[0][0])
    assert encode_conversation(TALK[:2], words, 999) == ids[:n]
    n += len(parts[1][0]) + len(parts[2][0])
    assert encode_conversation(TALK[:4], words, 999) == ids[:n]


def test_the_oldest_messages_are_forgotten():
    talk = TALK[:1] + 5 * [TALK[1], TALK[2]] + [{"role": "user", "content": "the last"}]
    whole = Encoder([]).decode(encode_conversation(talk, Encoder([]), 9999))
    shortest = "System: Be brief.\nUser: the last\nAssistant:"
    for n in (9999, len(whole), len(whole) - 1, 200, 120, len(shortest)):
        ids = encode_conversation(talk, Encoder([]), n)
        text = Encoder([]).decode(ids)
        assert len(ids) <= n and text.startswith("System: Be brief.\nUser: ")
        assert text.endswith("\nUser: the last\nAssistant:") and whole.endswith(text[18:])
    assert text == shortest
    with pytest.raises(ValueError, match=f"a message of {n} tokens, but there is room for {n - 1}"):
        encode_conversation(talk, Encoder([]), n - 1)
    check_messages(talk)


def test_no_more_is_forgotten_than_must_be(rng):
    """Beside a walk that leaves out a message, and the answer to it, until the rest fits."""
    for _ in range(100):
        roles = rng.choice(["user", "assistant", "system"], rng.integers(1, 20), p=[0.5, 0.4, 0.1])
        talk = [{"role": str(role), "content": "x" * rng.integers(9)} for role in roles]
        first, rest = (talk[:1], talk[1:]) if roles[0] == "system" else ([], talk)
        n = int(rng.integers(60, 250))
        ids = encode_conversation(talk, words, 9999)
        while len(ids) > n:
            rest = rest[2:] if len(rest) > 2 and rest[1]["role"] == "assistant" else rest[1:]
            ids = encode_conversation([*first, *rest], words, 9999)
        assert encode_conversation(talk, words, n) == ids


# --- Packing -------------------------------------------------------------------------------------


def random_examples(rng, n, n_most):
    """Marked examples, all of different first ids as far as 257 go."""
    found = []
    for _ in range(n):
        length = rng.integers(2, n_most + 1)
        n_read = rng.integers(1, length)
        ids = rng.integers(0, 257, length).tolist()
        found.append(mark([(ids[:n_read], False), (ids[n_read:], True)], n_most))
    return found


def unpacked(rows):  # -> the examples of some rows, in bytes
    found = []
    for row in rows:
        parts = np.split(row, np.flatnonzero(row & BEGINS)[1:])
        found += [part.tobytes() for part in parts if is_learned(part).any()]
    return sorted(found)


def test_every_example_is_packed_once_and_little_room_is_left(rng):
    for n, n_most in ((1, 5), (40, 12), (300, 33)):
        examples = random_examples(rng, n, n_most)
        rows = pack(examples, n_most)
        assert rows.shape[1] == n_most and rows.dtype == np.int32
        assert unpacked(rows) == sorted(example.tobytes() for example in examples)
        least = -(-sum(map(len, examples)) // n_most)
        assert len(rows) <= 11 / 9 * least + 4  # of best fit decreasing (Johnson 1973)


def test_a_tenth_is_held_out_at_random():
    for n in (2, 3, 9, 10, 11, 19, 20, 100):
        train, val = hold_out(list(range(n)))
        assert sorted(train + val) == list(range(n)) and len(val) == max(1, n // 10)
        assert train == sorted(train) and val == sorted(val)
        assert hold_out(list(range(n))) == (train, val)
    train, val = hold_out(list(range(10000)))
    counts = np.bincount(np.array(val) % 10, minlength=10)
    assert counts.min() > 60 and counts.max() < 140  # of data made in rounds of ten
    gaps = np.diff(val)
    assert 8 < gaps.std() < 11  # a draw's are geometric: sqrt(90)


def test_no_class_of_data_made_in_rounds_of_ten_is_lost(tmp_path):
    lines = [{"prompt": "x", "completion": str(number % 10)} for number in range(1000)]
    opened = open_text(write(tmp_path / "a.jsonl", *lines), None, 8)
    for rows in (opened.train[0], opened.windows):
        assert set(rows[is_learned(rows)].tolist()) == {256, *Encoder([]).encode("0123456789")}


def test_the_rows_to_validate_with_are_drawn_from_all_lengths(rng):
    examples = [mark([(range(n), True)], 64) for n in rng.integers(2, 64, 9000).tolist()]
    rows = pack(examples, 64)

    def lengths(rows):  # of the longest example in each, which comes first
        return 1 + np.argmax(rows[:, 1:] & BEGINS > 0, axis=1)

    def error(rules):
        return abs(lengths(thin(rows, 400, rules)).mean() - lengths(rows).mean())

    limit = 4 * lengths(rows).std() / 400**0.5
    assert error(RULES) < limit < error(FIRST_RULES)
    assert (thin(rows, len(rows)) == rows).all() and len(thin(rows, 400)) == 400
    assert (thin(rows, 400) == thin(rows, 400)).all()


def test_an_earlier_run_goes_on_with_its_rules(tmp_path, monkeypatch):
    """A checkpoint that names no rules is of a run that cut, held out and measured as here."""
    monkeypatch.setattr(training.text, "MOST_VALIDATION", 3 * 12)
    lines = [{"prompt": "p" * n, "completion": f"{n}" * n} for n in range(1, 61)]
    path = write(tmp_path / "a.jsonl", *lines, {"messages": TALK})
    encode = Encoder([]).encode
    examples = [
        mark([(encode(row["prompt"]), False), ([*encode(row["completion"]), 256], True)], 13)
        for row in lines
    ]
    examples.append(mark(encode_messages(TALK, Encoder([])), 13))
    held_out = pack(examples[9::10], 13)[:3]
    rows = pack([example for number, example in enumerate(examples, 1) if number % 10], 13)
    earlier = open_text(path, None, 12, {"n_train": 1})
    assert (earlier.train[0] == rows).all() and (earlier.windows == held_out).all()
    assert open_text(path, None, 12, earlier.description).description == earlier.description
    today = open_text(path, None, 12)
    assert open_text(path, None, 12, today.description).description == today.description
    assert today.description["training"] != earlier.description["training"]


def test_rows_are_taken_in_turn_wherever_a_run_begins(rng):
    seed, n_rows = int(rng.integers(2**32)), 7
    whole = batches.draw_rows(seed, 0, (20, 2, 3), n_rows)
    packs = whole.ravel()[: 17 * n_rows].reshape(17, n_rows)
    assert all(sorted(some) == list(range(n_rows)) for some in packs.tolist())
    assert len({tuple(some) for some in packs.tolist()}) > 9  # in another order each time
    for first in (1, 5, 19):
        assert (batches.draw_rows(seed, first, (20 - first, 2, 3), n_rows) == whole[first:]).all()
    assert (batches.draw_rows(seed + 1, 0, (20, 2, 3), n_rows) != whole).any()


# --- The loss ------------------------------------------------------------------------------------


def theirs(model, examples):  # -> PyTorch's loss of examples, each by itself, and its gradients
    """The mean over all that is learned; ignore_index for the rest."""
    nats, n = 0, 0
    for example in examples:
        ids = torch.from_numpy(example & (READ - 1)).long()
        labels = torch.where(torch.from_numpy(is_learned(example)), ids, -100)
        logits = model(ids[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(
            logits, labels[1:], ignore_index=-100, reduction="sum"
        )
        n += int((labels[1:] != -100).sum())
    (nats / n).backward()
    grads = {name: x.grad.numpy() for name, x in model.transformer.named_parameters()}
    return nats.item() / n, grads


@pytest.mark.parametrize("n_chunks", [1, slow(4)])
def test_loss_and_gradients_are_those_of_each_example_by_itself(rng, n_chunks):
    params = random_params(rng, HPARAMS)
    examples = random_examples(rng, 12, 33)
    rows = jnp.asarray(pack(examples, 33))
    how = {"n_head": 3, "n_chunks": n_chunks, "packed": True}

    def loss(params):
        return train_jax.mean_loss(params, rows, **how)

    value, ours = jax.jit(jax.value_and_grad(loss))(jax.tree.map(jnp.asarray, params))
    wanted, grads = theirs(hugging_face(params, HPARAMS), examples)
    assert abs(value / wanted - 1) < 1e-5
    c_attn = [block["attn"]["c_attn"]["w"] for block in ours["blocks"]]
    pairs = [(ours["wte"], "wte.weight"), (ours["wpe"], "wpe.weight")]
    pairs += [(x, f"h.{i}.attn.c_attn.weight") for i, x in enumerate(c_attn)]
    for x, name in pairs:
        assert np.linalg.norm(x - grads[name]) < 1e-4 * np.linalg.norm(grads[name]), name
    counts = jnp.ones((1, len(rows)))
    validation = train_jax.validation_loss(
        jax.tree.map(jnp.asarray, params), rows[None], counts, **how
    )
    assert abs(validation / wanted - 1) < 1e-5


def test_the_loss_of_a_row_is_the_mean_over_what_it_learns(rng):
    params = jax.tree.map(jnp.asarray, random_params(rng, HPARAMS))
    rows = jnp.asarray(pack(random_examples(rng, 12, 33), 33))
    losses = train_jax.losses(params, rows, 3, packed=True)
    n_learned = (np.asarray(rows)[:, 1:] & READ == 0).sum(-1)
    nats = train_jax.row_nats(params, rows, 3, packed=True)
    assert len(set(n_learned)) > 1 and np.allclose(losses, nats / n_learned, rtol=1e-5)
    wanted = (np.asarray(losses) * n_learned).sum() / n_learned.sum()
    assert np.isclose(train_jax.mean_loss(params, rows, 3, packed=True), wanted, rtol=1e-5)
    first = jnp.float32(n_learned.sum() / rows[:, 1:].size)  # of a step's two batches, all rows
    halves = [
        train_jax.mean_loss(params, x, 3, first, packed=True) for x in (rows[::2], rows[1::2])
    ]
    sizes = np.array([len(rows[::2]), len(rows[1::2])]) / len(rows)
    assert np.isclose(sizes @ np.array(halves), wanted, rtol=1e-5)


def test_no_example_sees_another(rng):
    """Of three in a row, one changes, and no other's loss does."""
    params = jax.tree.map(jnp.asarray, random_params(rng, HPARAMS))
    examples = random_examples(rng, 3, 11)
    others = random_examples(rng, 3, 11)
    others = [np.resize(o, len(e)) for o, e in zip(others, examples, strict=True)]
    others = [o & (READ - 1) | e & ~(READ - 1) for o, e in zip(others, examples, strict=True)]
    loss = jax.jit(lambda row: train_jax.losses(params, row[None], n_head=3, packed=True)[0])

    def loss_of(i, row):  # of all in a row only the i-th is learned
        row = np.concatenate([e if j == i else e | READ for j, e in enumerate(row)])
        return float(loss(jnp.asarray(np.append(row, np.full(33 - len(row), READ | BEGINS)))))

    for changed in range(3):
        row = [others[i] if i == changed else examples[i] for i in range(3)]
        for i in range(3):
            if i == changed:
                assert loss_of(i, row) != loss_of(i, examples)
            else:
                assert loss_of(i, row) == loss_of(i, examples)


def train_rows(rng, n_devices, examples, seed):  # -> the loss of 3 steps, and the parameters
    mesh = devices.make_mesh(n_devices)
    schedule = train_jax.make_schedule(6, 1e-3, 1e-5, 2)
    optimizer = train_jax.make_optimizer(schedule, "adamw", 0.1, 1.0, 0.99)
    params = random_params(np.random.default_rng(seed), HPARAMS)
    state, shardings = train_jax.start_state(params, None, 0, optimizer, 257, mesh, False)
    how = {"dtype": "float32", "n_head": 3, "packed": True}
    steps = train_jax.make_train_steps(optimizer, shardings=shardings, **how)
    spec = devices.make_sharding(mesh, None, None, "data")
    rows = batches.read_batches([pack(examples, 33)], seed, 0, (3, 2, 8), 32, spec)
    state, (loss, *_) = steps(state, rows, 3)
    return float(loss), devices.to_host(state[0])


@pytest.mark.slow
def test_eight_devices_learn_what_one_does(rng):
    examples, seed = random_examples(rng, 60, 33), int(rng.integers(2**31))
    loss, params = train_rows(rng, 1, examples, seed)
    on_eight, others = train_rows(rng, 8, examples, seed)
    assert abs(on_eight / loss - 1) < 1e-5
    for ours, other in zip(*map(jax.tree.leaves, (params, others)), strict=True):
        assert np.linalg.norm(ours - other) <= 1e-3 * np.linalg.norm(ours)


# --- Runs ----------------------------------------------------------------------------------------

SMALL = ["--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--n_ctx", 32, "--batch_size", 4]
SMALL += ["--eval_every", 20, "--checkpoint_every", 10, "--learning_rate", 0.01]


def sums(path):
    pairs = [(a, b) for a in range(10) for b in range(10)]
    return write(path, *({"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in pairs))


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_with_the_same_bits(tmp_path):
    path, out = sums(tmp_path / "sums.jsonl"), tmp_path / "out"
    code, said, _ = call_trainer("--data", path, "--out", out, "--n_steps", 40, *SMALL)
    assert code == 0 and " tokens to learn, of 100 examples\n" in said
    last = out / "checkpoints" / "00000040"
    names = ("model.safetensors", "optimizer.safetensors")
    wanted = [(last / name).read_bytes() for name in names]
    shutil.rmtree(last)
    code, said, _ = call_trainer("--resume", out)
    assert code == 0 and " after step 30 of 40: the learning rate is" in said
    assert [(last / name).read_bytes() for name in names] == wanted
    shutil.rmtree(last)
    run_json = out / "checkpoints" / "00000030" / "run.json"
    metadata = json.loads(run_json.read_text())
    metadata["text"] = open_text(str(path), None, 32, {}).description | {
        "examples": "in a few words"
    }
    del metadata["text"]["rules"]  # as an earlier run wrote it
    run_json.write_text(json.dumps(metadata))
    code, said, _ = call_trainer("--resume", out)
    assert code == 0 and ") after step 30 of 40: the learning rate is" in said
    assert [(last / name).read_bytes() for name in names] != wanted  # it learns other examples
    shutil.rmtree(last)
    write(tmp_path / "sums.jsonl", *2 * [{"prompt": "another", "completion": "example"}])
    code, _, complaint = call_trainer("--resume", out)
    assert code == 2 and "is not the text that" in complaint


@pytest.mark.slow
def test_a_model_that_is_finetuned_on_conversations_gets_their_template(tmp_path):
    path = sums(tmp_path / "sums.jsonl")
    talks = write(tmp_path / "talks.jsonl", *9 * [{"messages": TALK[1:3]}])
    plain, talker = tmp_path / "plain", tmp_path / "talker"
    code, _, complaint = call_trainer("--data", path, "--out", plain, "--n_steps", 10, *SMALL)
    assert code == 0 and get_encoder("", plain).chat_template is None, complaint
    flags = ["--init_from", plain, "--data", talks, "--n_steps", 10, "--batch_size", 4]
    code, _, complaint = call_trainer(*flags, "--out", talker)
    assert code == 0, complaint
    last = talker / "checkpoints" / "00000010"
    for folder in (talker, last):
        assert get_encoder("", folder).chat_template == CHAT_TEMPLATE


# --- kv_cache.py --chat --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, None])
def test_a_chat_says_what_the_plain_pass_says_after_the_whole_conversation(models, n):
    """gpt2.generate's answer, of ids that are put together anew for every line.

    Without -n an answer may fill the context, of which a quarter at least is left for it.
    """
    folder, params = models
    lines, encoder = ["Hi", "You?", "Hm", "a line that is much too long to fit"], Encoder([])
    n_ctx = TINY["n_ctx"]
    n_most = n_ctx - (n or n_ctx // 4)
    flags = ["--chat", *(["-n", n] if n else []), "--model_size", "tiny"]
    code, said, complaint = call(
        "kv_cache.py", *flags, models_dir=folder, input="\n".join(lines).encode()
    )
    messages, wanted = [], ""
    for line in lines[:3]:
        messages.append({"role": "user", "content": line})
        ids = encode_conversation(messages, encoder, n_most)
        n_new = n or n_ctx - len(ids)
        answer = generate(ids, params, TINY["n_head"], n_new, endoftext=encoder.endoftext)
        answer = encoder.decode(answer).partition(NEXT_TURN)[0].lstrip()
        messages.append({"role": "assistant", "content": answer})
        wanted += answer + "\n"
    assert (code, said) == (0, wanted)
    assert complaint == f"error: a message of 52 tokens, but there is room for {n_most}\n"


def test_what_was_said_before_ctrl_c_is_kept(capsys):
    heard = []

    def answer(ids, n):
        heard.append(Encoder([]).decode(ids))
        yield " Well"
        raise KeyboardInterrupt

    say = converse(answer, Encoder([]), 999)
    for line in ("Hi", "And?"):
        with pytest.raises(KeyboardInterrupt):
            say([line])
    assert capsys.readouterr().out == "WellWell"
    assert heard[1] == f"User: Hi\nAssistant: Well{ENDOFTEXT}\nUser: And?\nAssistant:"


def test_what_does_not_go_with_a_chat(models):
    for flag in (["--n_samples", 2], ["--echo"], ["--jsonl"], ["--slide"]):
        code, _, complaint = call("kv_cache.py", "--chat", *flag, models_dir=models[0])
        name = flag[0].removeprefix("--")
        wanted = f"error: --chat gives one answer to each line, so leave out --{name}\n"
        assert (code, complaint) == (2, wanted)
    assert call("kv_cache.py", "Hi", "--chat", models_dir=models[0])[0] == 2
