"""Rows: texts that are written together, what runs in a pass, and what a row does with it.

A `Row` is one text being written, its `sampler` samples its tokens, and an `Event` says what it
wrote. kv_cache.Batch makes the passes: it asks `plan_pass` which ids go into each pass, and gives
every row the logits of its next token (`Row.write`).
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from generation.lookup import guess, new_trust
from generation.sampling import Sampler
from gpt2 import end_ids_of

MIN_SHARED = 8  # tokens at the beginning of two rows; fewer are not worth waiting for


class Event(NamedTuple):
    """A row has written a token, or has ended, or both."""

    row: int  # the row's number
    token: int | None  # None for <|endoftext|>, which is not part of the text
    end: str | None  # None while the row goes on, otherwise "length", "endoftext" or "stop"


def ids_of(events):  # iterable of Event -> a list of ids for each row, in order
    rows = {}
    for event in events:
        ids = rows.setdefault(event.row, [])
        if event.token is not None:
            ids.append(event.token)
    return [rows[row] for row in sorted(rows)]


@dataclass(slots=True, eq=False)
class Row:
    """One text being written. It joins a batch between two passes, and leaves when it has ended."""

    prompt: list[int]  # at least one id
    n_tokens: int  # to write at most; 0 only reads the prompt
    sampler: Sampler
    number: int = 0  # of its events
    endoftext: int | tuple | None = None  # an id that ends the row, or several
    lookup: int = 0  # the most guesses that a pass checks

    ids: list[int] = field(default_factory=list)  # written so far
    end: str | None = None  # why it has ended
    cache: object = None  # kv_cache.Cache, from its first pass on
    n_forgotten: int = 0  # how many first tokens a full row's cache no longer has
    source: "Row | None" = None  # the row whose cache it copies at its first pass ...
    n_shared: int = 0  # ... and how many first tokens it has in common with that row
    guesses: list[int] = field(default_factory=list)  # for the next pass
    trust: float = 1.0  # in guesses

    @property
    def text(self):
        return self.prompt + self.ids

    @property
    def seen(self):  # the part of the text that the model sees
        return self.text[self.n_forgotten :]

    @property
    def n_read(self):  # tokens in the cache
        return 0 if self.cache is None else self.cache.n_seq

    def n_ahead(self):
        """How many guesses the cache has read beyond the text. Negative while it is behind."""
        return self.n_forgotten + self.n_read - len(self.prompt) - len(self.ids)

    def rewind(self):
        """Forgets the text's last token if it has run, but an interruption lost its logits."""
        if self.n_ahead() >= 0:
            self.cache.n_seq -= 1 + self.n_ahead()

    def next_ids(self):
        """The ids to run next: the part of the text that the cache has not read, and the guesses.

        This follows from the cache. So after a pass that was interrupted, the same ids come again.
        """
        n = self.n_forgotten + self.n_read
        n_written = max(0, n - len(self.prompt))
        return self.prompt[n:] + self.ids[n_written:] + self.guesses

    def find_source(self, others):
        """Finds, among other rows, the one that shares the longest beginning with this row.

        A row that has forgotten its own beginning has no use for another's.
        """
        if self.sampler.needs_states or self.n_forgotten:
            return
        shared = [(self.n_in_common(other), other.n_read) for other in others]
        best = max(shared, default=(0, 0))
        self.n_shared = best[0]
        self.source = others[shared.index(best)] if self.n_shared else None

    def n_in_common(self, other):
        """How many first tokens of the prompt, without its last one, the other row also has."""
        if other.n_forgotten:
            return 0
        ours = self.prompt[:-1]
        pairs = enumerate(zip(ours, chain(other.prompt, other.ids), strict=False))
        n_most = min(len(ours), len(other.prompt) + len(other.ids))
        n = next((i for i, (a, b) in pairs if a != b), n_most)
        return n if n >= MIN_SHARED else 0

    def n_to_copy(self):
        """How many tokens of its source's cache the row begins with.

        None while it must wait for the source to read the part that they share.
        """
        source = self.source
        if source is None or source.n_forgotten:
            return 0
        if source.n_read < self.n_shared and not source.end:
            return None
        return min(self.n_shared, source.n_read)

    def write(self, logits):  # [1 + n_guesses, n_vocab], after each token of its pass -> [Event]
        """Samples the next token, and one more for every guess that turns out right."""
        if self.n_tokens == 0:
            self.end = "length"
            return [Event(self.number, None, self.end)]
        guesses = self.guesses[: len(logits) - 1]  # those that were in the pass
        events = []
        for guessed, scores in zip([*guesses, None], logits, strict=True):
            token = self.sampler.sample(scores, self)
            events.append(self.add(token))
            if self.end or token != guessed:
                break
        n_right = len(events) - 1
        self.cache.n_seq -= len(guesses) - n_right  # forgets the wrong ones
        self.trust = new_trust(self.trust, len(guesses), n_right)
        n = min(self.lookup, self.n_tokens - len(self.ids) - 1) if self.trust >= 1 else 0
        self.guesses = guess(self.text, n) if n > 0 else []
        return events

    def add(self, token):  # -> Event
        """Adds the next token to the text, and notes whether the row ends with it."""
        if token in end_ids_of(self.endoftext):
            self.end = "endoftext"
            return Event(self.number, None, self.end)
        self.ids.append(token)
        if self.sampler.is_complete(self.ids):
            self.end = "stop"
        elif len(self.ids) == self.n_tokens:
            self.end = "length"
        return Event(self.number, token, self.end)


def plan_pass(rows, n_tokens):  # -> [(row, the ids it runs in this pass)], n_tokens at most
    """First the rows that write, each with one token and its guesses; then the shortest prompts.

    Rows that write share the pass evenly. n_tokens: at least one for each row.
    """
    n_each = n_tokens // max(1, sum(1 for row in rows if row.ids))
    waiting = [(row, row.next_ids()) for row in rows if row.cache is not None]
    shares = []
    for row, ids in sorted(waiting, key=lambda pair: (not pair[0].ids, len(pair[1]))):
        ids = ids[: min(n_tokens, n_each) if row.guesses else n_tokens]
        if ids:
            shares.append((row, ids))
            n_tokens -= len(ids)
    return shares
