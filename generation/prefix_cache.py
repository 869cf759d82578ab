"""The prefix cache: caches of rows that have ended, for new texts with the same beginning."""

MAX_ROWS = 64  # every new row is compared with all of them
MAX_BYTES = 256 << 20  # that their caches may take together


class PrefixCache:
    """Rows that have ended; the one that was used last stands last."""

    def __init__(self):
        self.rows = []

    def add(self, row):
        """Adds a row that has ended. Drops the rows it continues, and the oldest beyond a limit."""
        row.sampler = None  # only its text and its cache are needed from now on
        text = row.text
        self.rows = [old for old in self.rows if old.text != text[: len(old.text)]]
        self.rows.append(row)
        while len(self.rows) > MAX_ROWS or self.n_bytes() > MAX_BYTES:
            del self.rows[0]

    def n_bytes(self):
        return sum(row.cache.kv.nbytes for row in self.rows)

    def touch(self, row):
        """Marks a row as used, so that it is dropped last. Other rows are ignored."""
        if any(old is row for old in self.rows):
            self.rows = [*(old for old in self.rows if old is not row), row]

    def clear(self):
        self.rows = []
