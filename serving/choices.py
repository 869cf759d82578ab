"""One text of an answer as it grows, without incomplete characters and without stop strings.

The engine's thread adds one token at a time, and takes the text that may be shown by then, together
with its log-probabilities.
"""

import codecs
import math
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from generation.rows import Row
from generation.sampling import new_rng
from generation.stops import hold_back, until_stop
from gpt2 import end_ids_of, penalize_repetition, sample
from pages.predictions import likeliest

SCORED = 64  # positions whose logits are in memory at the same time while a prompt is scored


class Part(NamedTuple):
    """The news of a choice since its last part."""

    index: int  # the choice's
    text: str
    entries: list  # of log-probabilities: (id, its own, likeliest ids, theirs, offset in the text)
    end: str | None  # why the text has ended, or None if it hasn't
    n_sampled: int  # the tokens sampled since the text began


class Choice:
    """One of the texts that a request asks for. It is the sampler of the row that generates it.

    state: the application's state, with the encoder, n_ctx and the engine.
    deliver: deliver(part) is called with each Part, in asyncio's thread.
    twin: the choice that scores the same prompt, if there is one.
    """

    def __init__(self, asked, index, state, deliver, twin=None):
        self.asked = asked
        self.index = index
        self.encoder = encoder = state.encoder
        self.logits_of = state.engine.logits_of
        self.deliver = deliver
        self.twin = twin
        self.is_dropped = False  # whether its client has gone
        self.prompt = asked.prompts[index // asked.n]
        endoftext = None if asked.ignore_eos else encoder.end_ids
        n_tokens = min(asked.max_tokens, state.n_ctx - len(self.prompt))  # as many as fit
        self.row = Row(self.prompt, n_tokens, sampler=self, endoftext=endoftext)
        self.rng = new_rng(asked.seed, index)
        self.sampling = asked.sampling._replace(repetition_penalty=1.0)  # adjust applies it
        self.counts = {}  # {id: how often it was sampled}
        self.error = None  # an error in this text only
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text = ""
        self.held = ""  # text that may still become a stop string
        self.has_stopped = False
        self.entries = []
        self.n_sampled = 0
        self.n_scored = 0  # tokens of the prompt
        self.n_text_taken = 0
        self.n_entries_taken = 0
        self.needs_states = asked.is_scored and twin is None
        if self.needs_states:
            self.note(self.prompt[0])
        elif asked.echo:
            self.text = self.utf8.decode(encoder.decode_bytes(self.prompt))

    @property
    def may_begin(self):
        """False while another text is still scoring the same prompt."""
        twin = self.twin
        return twin is None or twin.n_scored == len(self.prompt) or twin.row.end is not None

    @property
    def is_scoring(self):
        return self.needs_states and 0 < self.n_scored < len(self.prompt)

    def begin(self):
        """Copies the prompt's scores from the twin, once."""
        if self.twin is not None and not self.entries:
            self.entries = self.twin.entries[: len(self.prompt)]
            self.error = self.twin.error

    # An error in one of these two methods is kept, and ends only this text.

    def read_states(self, x):  # [n, n_embd], of the prompt's next n tokens
        """Scores the tokens of the prompt after these positions, a few logits at a time."""
        targets = self.prompt[self.n_scored + 1 : self.n_scored + 1 + len(x)]
        self.n_scored += len(x)
        try:
            for start in range(0, len(targets), SCORED):
                ids = targets[start : start + SCORED]
                logits = self.logits_of(x[start : start + len(ids)])
                for entry in zip(ids, *log_probs_of(logits, ids, self.asked.logprobs), strict=True):
                    self.note(*entry)
        except Exception as error:
            self.error = error

    def sample(self, logits, row):  # [n_vocab] -> one token id
        n_logprobs = self.asked.logprobs
        try:
            id = sample(self.adjust(logits, row), self.rng, *self.sampling)
            self.n_sampled += 1
            self.counts[id] = self.counts.get(id, 0) + 1
            if n_logprobs is None:
                self.note(id)
            else:
                self.note(id, *(x[0] for x in log_probs_of(logits[None], [id], n_logprobs)))
            return id
        except Exception as error:
            self.error = self.error or error
            return 0

    def adjust(self, logits, row):  # [n_vocab] -> [n_vocab]
        """Adds the request's bias, then applies its penalties in vLLM's order."""
        asked = self.asked
        if asked.bias is not None:
            logits = logits + asked.bias
        penalty = asked.sampling.repetition_penalty
        if penalty != 1:
            logits = penalize_repetition(logits, row.text, penalty)
        if asked.presence_penalty or asked.frequency_penalty:
            logits = logits.copy()
            for id, n in self.counts.items():
                logits[id] -= asked.presence_penalty + n * asked.frequency_penalty
        if self.n_sampled < asked.min_tokens:
            logits = logits.copy()
            ends = asked.stop_ids.union(end_ids_of(self.row.endoftext))
            logits[list(ends)] = -np.inf
        return logits

    def is_complete(self, ids):
        return self.has_stopped or self.error is not None

    def note(self, id, log_prob=None, best_ids=None, best=None):
        """Adds the next token, from the prompt or sampled: its text and its log-probabilities."""
        if self.asked.logprobs is not None:
            offset = len(self.text) + len(self.stripped(self.held))
            self.entries.append((id, log_prob, best_ids, best, offset))
        if self.n_sampled and id in end_ids_of(self.row.endoftext):
            return
        if self.n_sampled and id in self.asked.stop_ids:
            self.has_stopped = True
            self.add(self.held + self.utf8.decode(b"", final=True))
            self.held = ""
            return
        text = self.utf8.decode(self.encoder.decode_bytes([id]))
        stops = self.asked.stops
        if self.n_sampled > self.asked.min_tokens:
            text, self.held, self.has_stopped = until_stop(self.held + text, len(text), stops)
        elif self.n_sampled:  # a stop may begin here and end later
            text, self.held = hold_back(self.held + text, stops)
        self.add(text)

    def add(self, text):
        self.text += self.stripped(text)

    def stripped(self, text):  # -> as much of it as will be shown
        return text.lstrip() if self.asked.strip and not self.text else text

    def take(self, end):  # -> Part, or the exception that ended this text
        """end: why the text ends, or None. At its end, the part also has the text held back."""
        if self.error is not None:
            return self.error
        if end and not self.has_stopped:
            self.add(self.held + self.utf8.decode(b"", final=True))
        text = self.text[self.n_text_taken :]
        self.n_text_taken = len(self.text)
        n_sure = math.inf if end and not self.has_stopped else len(self.text)
        news = self.entries[self.n_entries_taken :]
        entries = list(takewhile(lambda entry: entry[-1] < n_sure, news))
        self.n_entries_taken += len(entries)
        return Part(self.index, text, entries, end, self.n_sampled)


def choices_of(asked, state, deliver):  # -> a Choice for each text, in the order to begin them
    """Equal prompts are scored once, by the first text of each, which begins before the others."""
    scoring = {}
    choices = []
    for index in range(asked.n_choices):
        prompt = tuple(asked.prompts[index // asked.n]) if asked.is_scored else index
        choice = Choice(asked, index, state, deliver, scoring.get(prompt))
        scoring.setdefault(prompt, choice)
        choices.append(choice)
    return sorted(choices, key=lambda choice: choice.twin is not None)


def log_probs_of(logits, ids, n):  # [rows, n_vocab], [rows] -> [rows], [rows, n] ids, [rows, n]
    """Returns the log-probability of each row's id, and the n largest with their ids, sorted.

    They are those of the raw logits, before any temperature, as in OpenAI and vLLM. Both results
    come from the same floats, so a client can compare them for equality.
    """
    log_probs = logits - logits.max(-1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
    best = likeliest(log_probs, n)
    return log_probs[np.arange(len(ids)), ids], best, np.take_along_axis(log_probs, best, -1)


def logprobs_of(entries, encoder):  # -> the protocol's four lists, and the ids
    """If two ids have the same text, as parts of characters may, the larger value is kept."""
    lists = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    lists |= {"token_ids": []}  # since the text of a part of a character is ambiguous
    for id, log_prob, best_ids, best, offset in entries:
        text = encoder.decode([id])
        tops = None
        if log_prob is not None:
            log_prob = float(log_prob)
            tops = {}
            for other, value in zip(best_ids.tolist(), best.tolist(), strict=True):
                tops.setdefault(encoder.decode([other]), value)
            tops[text] = max(log_prob, tops.get(text, log_prob))
        for name, value in zip(lists, (text, log_prob, tops, offset, id), strict=True):
            lists[name].append(value)
    return lists
