"""One text of an answer as it grows: whole characters, nothing of a stop, log-probabilities.

The engine's thread adds a token at a time, and takes what may be shown by then.
"""

import codecs
import math
from typing import NamedTuple

import numpy as np

from generation.rows import Row
from generation.sampling import new_rng
from generation.stops import sort_stops, until_stop
from gpt2 import end_ids_of, sample
from pages.predictions import likeliest

SCORED = 64  # positions whose logits are held at once, while a prompt is scored


class Part(NamedTuple):
    """What is new of a choice since its last part."""

    index: int  # the choice's
    text: str
    entries: list  # of log-probabilities: (id, its own, likeliest ids, theirs, offset in the text)
    end: str | None  # why the text has ended, None while it goes on
    n_sampled: int  # tokens, since the text began


class Choice:
    """One of the texts that a request asks for, written by a row whose sampler it is.

    logits_of(x): what hidden states, [n, n_embd], predict. deliver(part) is called, in asyncio's
    thread, with each Part.
    """

    def __init__(self, asked, index, encoder, logits_of, deliver):
        self.asked = asked
        self.index = index
        self.encoder = encoder
        self.logits_of = logits_of
        self.deliver = deliver
        self.is_dropped = False  # has its client gone?
        self.prompt = asked.prompts[index // asked.n]
        endoftext = None if asked.ignore_eos else encoder.end_ids
        self.row = Row(self.prompt, asked.max_tokens, sampler=self, endoftext=endoftext)
        self.rng = new_rng(asked.seed, index)
        self.bias = bias_of(asked.logit_bias, encoder.n_vocab)
        self.stops = sort_stops(asked.stop)
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text = ""
        self.held = ""  # text that may yet become a stop
        self.has_stopped = False
        self.entries = []
        self.n_sampled = 0
        self.n_scored = 0  # tokens of the prompt
        self.n_text_taken = 0
        self.n_entries_taken = 0
        self.needs_states = asked.echo and asked.logprobs is not None
        if self.needs_states:
            self.note(self.prompt[0], None, None, None)
        elif asked.echo:
            self.text = self.utf8.decode(encoder.decode_bytes(self.prompt))

    def read_states(self, x):  # [n, n_embd], of the prompt's next n tokens
        """Scores the prompt's tokens after these, a few logits at a time."""
        targets = self.prompt[self.n_scored + 1 : self.n_scored + 1 + len(x)]
        self.n_scored += len(x)
        for start in range(0, len(targets), SCORED):
            ids = targets[start : start + SCORED]
            logits = self.logits_of(x[start : start + len(ids)])
            for entry in zip(ids, *log_probs_of(logits, ids, self.asked.logprobs), strict=True):
                self.note(*entry)

    def sample(self, logits):  # [n_vocab] -> one token id
        biased = logits if self.bias is None else logits + self.bias
        id = sample(biased, self.rng, *self.asked.sampling)
        self.n_sampled += 1
        entry = None, None, None
        if self.asked.logprobs is not None:
            entry = (array[0] for array in log_probs_of(logits[None], [id], self.asked.logprobs))
        self.note(id, *entry)
        return id

    def is_complete(self, ids):
        return self.has_stopped

    def note(self, id, log_prob, best_ids, best):
        """The next token, of the prompt or sampled: its text, and what is known of it."""
        if self.asked.logprobs is not None:
            offset = len(self.text) + len(self.held)
            self.entries.append((id, log_prob, best_ids, best, offset))
        if self.n_sampled and id in end_ids_of(self.row.endoftext):
            return
        text = self.utf8.decode(self.encoder.decode_bytes([id]))
        if self.n_sampled:
            text, self.held, self.has_stopped = until_stop(self.held + text, len(text), self.stops)
        self.add(text)

    def add(self, text):
        strip = self.asked.strip and not self.text
        self.text += text.lstrip() if strip else text

    def take(self, end):  # -> Part
        """end: why the text ends, or None. At its end, the part also has what was held back."""
        if end and not self.has_stopped:
            self.add(self.held + self.utf8.decode(b"", final=True))
        text = self.text[self.n_text_taken :]
        self.n_text_taken = len(self.text)
        n_sure = math.inf if end and not self.has_stopped else len(self.text)
        entries = [entry for entry in self.entries[self.n_entries_taken :] if entry[-1] < n_sure]
        self.n_entries_taken += len(entries)
        return Part(self.index, text, entries, end, self.n_sampled)


def bias_of(bias, n_vocab):  # {id: float} -> [n_vocab], or None
    if not bias:
        return None
    added = np.zeros(n_vocab, np.float32)
    added[list(bias)] = list(bias.values())
    return added


def log_probs_of(logits, ids, n):  # [rows, n_vocab], [rows] -> [rows], [rows, n] ids, [rows, n]
    """The log-probability of each row's id, and the n largest, largest first: of the same floats.

    Of the raw logits, before any temperature, as OpenAI and vLLM report them.
    """
    log_probs = logits - logits.max(-1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
    best = likeliest(log_probs, n)
    return log_probs[np.arange(len(ids)), ids], best, np.take_along_axis(log_probs, best, -1)


def logprobs_of(entries, encoder):  # -> the protocol's four lists, and the ids
    """Where two ids are the same text, the larger one's is kept: bytes of a character may be."""
    lists = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    lists |= {"token_ids": []}  # which a part of a character cannot be known by otherwise
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
