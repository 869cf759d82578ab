"""Texts that have ended and whose caches stay a while, for others that begin as they do."""

MOST_KEPT = 64  # texts: each that joins is compared with all of them
KEPT_BYTES = 256 << 20  # of their caches


def keep(kept, row):
    """The row, which has ended, joins the list; what it goes on from, and the oldest, leave it."""
    text = row["prompt"] + row["ids"]
    kept[:] = [old for old in kept if old["prompt"] != text[: len(old["prompt"])]]
    kept.append({"prompt": text, "ids": [], "cache": row["cache"], "end": row["end"]})
    kept[-1]["has_slid"] = row["has_slid"]
    while len(kept) > MOST_KEPT or sum(old["cache"]["kv"].nbytes for old in kept) > KEPT_BYTES:
        del kept[0]


def touch(kept, row):
    """What the row takes its beginning from counts as the latest again."""
    source = row["source"]
    if any(old is source for old in kept):
        kept[:] = [*(old for old in kept if old is not source), source]
