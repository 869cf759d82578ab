"""One text of an answer as it grows: whole characters, nothing of a stop, log-probabilities.

The engine's thread adds a token at a time, and takes what may be shown by then.
"""

import codecs
import math

import numpy as np

from engine.stops import sort_stops, until_stop
from pages.predictions import likeliest

SCORED = 64  # positions whose logits are held at once, while a prompt is scored


class Choice:
    """What a row's "draw", "stop" and "read" are. asked: protocol.read_completion's.

    draw_from(logits) -> a token id; logits_of(x) -> what hidden states, [n, n_embd], predict.
    """

    def __init__(self, prompt, asked, encoder, draw_from, logits_of):
        self.prompt, self.encoder = prompt, encoder
        self.draw_from, self.logits_of = draw_from, logits_of
        self.stops, self.n_logprobs = sort_stops(asked["stop"]), asked["logprobs"]
        self.end = None if asked["ignore_eos"] else encoder.endoftext
        self.bias = bias_of(asked["logit_bias"], encoder.n_vocab)
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.held, self.has_stopped = "", "", False
        self.strip = asked["strip"]  # leave out the white space that the text begins with?
        self.entries = []  # (id, its log-probability, likeliest ids, theirs, offset) of each token
        self.n_drawn = self.n_scored = 0
        self.n_taken, self.n_entries_taken = 0, 0  # of text and of entries
        self.is_scored = asked["echo"] and self.n_logprobs is not None
        if self.is_scored:
            self.note(prompt[0], None, None, None)
        elif asked["echo"]:
            self.text = self.utf8.decode(encoder.decode_bytes(prompt))

    def read(self, x):  # [n, n_embd]: the states of the prompt's next n tokens
        """Scores the prompt's tokens after these, a few logits at a time."""
        targets = self.prompt[self.n_scored + 1 : self.n_scored + 1 + len(x)]
        self.n_scored += len(x)
        for start in range(0, len(targets), SCORED):
            ids = targets[start : start + SCORED]
            logits = self.logits_of(x[start : start + len(ids)])
            for entry in zip(ids, *log_probs_of(logits, ids, self.n_logprobs), strict=True):
                self.note(*entry)

    def draw(self, logits):  # [n_vocab] -> one token id
        id = self.draw_from(logits if self.bias is None else logits + self.bias)
        self.n_drawn += 1
        entry = None, None, None
        if self.n_logprobs is not None:
            entry = (array[0] for array in log_probs_of(logits[None], [id], self.n_logprobs))
        self.note(id, *entry)
        return id

    def stop(self, ids):
        return self.has_stopped

    def note(self, id, log_prob, best_ids, best):
        """The next token, of the prompt or drawn: its text, and what is known of it."""
        if self.n_logprobs is not None:
            offset = len(self.text) + len(self.held)
            self.entries.append((id, log_prob, best_ids, best, offset))
        if self.n_drawn and id == self.end:
            return
        text = self.utf8.decode(self.encoder.decode_bytes([id]))
        if self.n_drawn:
            shown, self.held, stopped = until_stop(self.held + text, len(text), self.stops)
            text, self.has_stopped = shown, stopped
        self.add(text)

    def add(self, text):
        self.text += text.lstrip() if self.strip and not self.text else text

    def take(self, why):  # -> the text and the entries that are new since the last call
        """why: None while the text goes on. At its end, what was held back comes, too."""
        if why and not self.has_stopped:
            self.add(self.held + self.utf8.decode(b"", final=True))
        text, self.n_taken = self.text[self.n_taken :], len(self.text)
        sure = math.inf if why and not self.has_stopped else len(self.text)
        new = [entry for entry in self.entries[self.n_entries_taken :] if entry[-1] < sure]
        self.n_entries_taken += len(new)
        return text, new


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
