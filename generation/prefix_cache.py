"""The prefix cache keeps the caches of finished rows for new texts with the same beginning."""

MAX_ROWS = 64  # every new row is compared with all of them
MAX_BYTES = 256 << 20  # of all their caches


class PrefixCache:
    """Finished rows, least recently used first."""

    def __init__(self):
        self.rows = []

    def add(self, row):
        """Adds a row that has ended. Drops the rows it continues, and the oldest beyond a limit."""
        row.sampler = None  # only its text and its cache are needed from now on
        text = row.text
        for old in self.rows:
            if old.text == text[: len(old.text)]:
                old.cache = None
        self.rows = [old for old in self.rows if old.cache is not None]
        self.rows.append(row)
        while len(self.rows) > MAX_ROWS or self.n_bytes() > MAX_BYTES:
            self.rows.pop(0).cache = None  # frees it even if someone still holds the row

    def n_bytes(self):
        return sum(row.cache.kv.nbytes for row in self.rows)

    def touch(self, row):
        """Marks a row as just used, so that it is dropped last. Ignores rows that are not here."""
        if any(old is row for old in self.rows):
            self.rows = [*(old for old in self.rows if old is not row), row]

    def clear(self):
        for row in self.rows:
            row.cache = None
        self.rows = []
