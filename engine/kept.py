"""Texts that have ended. Their caches stay a while, for new texts with the same beginning."""

MOST_KEPT = 64  # texts: every new row is compared with all of them
KEPT_BYTES = 256 << 20  # that their caches may take together


def keep(kept, row):
    """Adds a row that has ended. Drops the texts it continues, and the oldest beyond a limit."""
    text = row["prompt"] + row["ids"]
    kept[:] = [old for old in kept if old["prompt"] != text[: len(old["prompt"])]]
    kept.append({"prompt": text, "ids": [], "cache": row["cache"], "end": row["end"]})
    kept[-1]["has_slid"] = row["has_slid"]
    while len(kept) > MOST_KEPT or sum(old["cache"]["kv"].nbytes for old in kept) > KEPT_BYTES:
        del kept[0]


def touch(kept, row):
    """The text whose cache the row copies counts as the latest again, so it is dropped last."""
    source = row["source"]
    if any(old is source for old in kept):
        kept[:] = [*(old for old in kept if old is not source), source]
