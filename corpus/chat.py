"""Conversations as text: the one template of training, kv_cache.py --chat and serve.py.

    System: Answer in one sentence.
    User: What is the capital of France?
    Assistant: Paris.<|endoftext|>
    User: And of Spain?
    Assistant:

GPT-2 has no tokens for speakers, so this is text that it can read from the start: a name and a
colon, the message without the white space around it, and a new line. Only an answer ends with the
id of the end token, which no message can contain, so that a model learns to say when it is done.
The space before a message belongs to its first word, as always in GPT-2, so no token spans the ":".
"""

from bisect import bisect_left

from encoder import ENDOFTEXT

NAMES = {"system": "System:", "user": "User:", "assistant": "Assistant:"}
CHAT_TEMPLATE = (  # the same for transformers' apply_chat_template, in Jinja
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "Assistant: {{ message.content | trim }}{{ eos_token }}"
    "{{ '\n' if not loop.last or add_generation_prompt }}"
    "{% else %}"
    "{{ 'User' if message.role == 'user' else 'System' }}: {{ message.content | trim }}{{ '\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{{ 'Assistant:' if add_generation_prompt }}"
)
NEXT_TURN = "\nUser:"  # what a model writes next if it has not learned to end its answers


def check_messages(messages):  # -> the messages, each with a role of NAMES and a text
    """Return messages as OpenAI's clients send them in their plain form.

    The role developer is system; a list of text parts is their texts, joined; a content that is
    null is empty. Raises ValueError for tools' messages and everything else that is not text.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is not a list of messages")
    return [check_message(message, number) for number, message in enumerate(messages, 1)]


def check_message(message, number):  # -> the message in its plain form
    no_text = ValueError(f"message {number} has no content that is text")
    if not isinstance(message, dict) or "content" not in message:
        raise no_text
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise ValueError(f"message {number} has {name}, which are not supported")
    content = message["content"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise no_text
    role = "system" if message.get("role") == "developer" else message.get("role")
    if not isinstance(role, str) or role not in NAMES:
        raise ValueError(f"message {number}: role is {role!r}, not {', '.join(NAMES)}")
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(f"message {number}: weight is {message['weight']!r}, not 0 or 1")
    return message | {"role": role, "content": "".join(part["text"] for part in parts)}


def encode_messages(messages, encoder):  # -> [(ids, whether they are an answer), ...]
    """Encode the parts that are only read, and the answers. messages: as check_messages allows.

    All text between two answers is encoded as one, and every answer by itself, so that the ids at
    the beginning stay the same while the conversation grows.
    """
    parts = []
    text = ""
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "assistant":
            parts.append((encoder.encode(text + NAMES["assistant"]), False))
            content = without_end(content, encoder)
            is_learned = is_learned_answer(message, encoder)
            parts.append((encode_answer(" " + content, encoder), is_learned))
            text = "\n"
        else:
            text += f"{NAMES[message['role']]} {content}\n"
    if text.strip():
        parts.append((encoder.encode(text), False))
    return parts


def is_learned_answer(message, encoder):
    """Is it the assistant's? Empty answers, and those with the weight 0, are only read."""
    is_answer = message["role"] == "assistant" and message.get("weight", 1) != 0
    return is_answer and not is_empty_answer(message, encoder)


def is_empty_answer(message, encoder):
    text = without_end(message["content"].strip(), encoder)
    return message["role"] == "assistant" and text == ""


def encode_answer(text, encoder):  # -> ids, followed by the end token if there is one
    ids = encoder.encode(text)
    return ids if encoder.endoftext is None else [*ids, encoder.endoftext]


def without_end(text, encoder):
    """Drop an end token that ends an answer: it is the end, which encode_answer appends."""
    for end in [ENDOFTEXT, *(encoder.decode([id]) for id in encoder.end_ids)]:
        for answer in (text, text.rstrip()):
            if answer.endswith(end):
                return answer.removesuffix(end)
    return text


def encode_conversation(messages, encoder, n_max):  # -> at most n_max ids
    """Encode the prompt for the next answer, up to its "Assistant:".

    If the conversation is too long, the oldest messages are left out, but never a system message
    at the beginning. Raises ValueError if the last message alone is too long.
    """
    next_answer = {"role": "assistant", "content": ""}
    parts = encode_latest([*messages, next_answer], encoder, n_max)
    ids = [id for part, _ in parts[:-1] for id in part]
    if len(ids) > n_max:
        raise ValueError(f"a message of {len(ids)} tokens, but there is room for {n_max}")
    return ids


def encode_latest(messages, encoder, n_max):  # -> [(ids, whether they are an answer), ...]
    """encode_messages of the latest ones, with at most n_max ids before the last message's own.

    messages: they end with an answer. As few of the oldest as possible are left out, but never a
    system message at the beginning, nor the message before the last answer: if that one is too
    long, the result is too long.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []

    def encode_from(start):
        return encode_messages([*system, *messages[start:]], encoder)

    def fits(start):
        return sum(len(ids) for ids, _ in encode_from(start)[:-1]) <= n_max

    # Fewer messages have fewer ids, so bisection finds the first start that fits.
    starts = possible_starts(messages[:-1], len(system))
    i = bisect_left(starts, True, key=fits)
    return encode_from(starts[min(i, len(starts) - 1)])


def possible_starts(messages, start):  # -> indices of the messages that can come first
    """An answer is left out together with the message before it. The last message stays."""
    starts = [start]
    while len(messages) - start > 1:
        is_answered = len(messages) - start > 2 and messages[start + 1]["role"] == "assistant"
        start += 2 if is_answered else 1
        starts.append(start)
    return starts
