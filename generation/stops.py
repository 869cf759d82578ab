"""Stop strings: a text arrives in parts, and is shown only up to the first stop string.

`stops_with` ends a row, and `up_to` cuts the text that is shown. Both find a stop string as soon as
it is complete.
"""

from bisect import bisect_left


def until_stop(held, n_new, stops):  # -> (what may be shown, what is held back, is one complete?)
    """Cuts `held` before the first stop. Holds back an end that may be the beginning of a stop.

    Only the last n_new characters are new, so a stop can only end among these. stops: what
    sort_stops returns. A stranger may send many stops, so the work does not grow with their number.

    >>> stops = sort_stops(["END"])
    >>> until_stop("Yes. EN", 7, stops), until_stop("Yes. END of", 4, stops)
    (('Yes. ', 'EN', False), ('Yes. ', '', True))
    """
    ordered, known, lengths = stops
    if not ordered:
        return held, "", False
    ends = range(len(held) - n_new + 1, len(held) + 1)
    starts = [end - n for end in ends for n in lengths if n <= end and held[end - n : end] in known]
    if starts:
        return held[: min(starts)], "", True
    return *hold_back(held, stops), False


def hold_back(text, stops):  # -> (what may be shown, an end that may be the beginning of a stop)
    ordered, _, lengths = stops
    for start in range(max(0, len(text) - max(lengths, default=0) + 1), len(text)):
        after = bisect_left(ordered, text[start:])  # stops that begin with it come here
        if after < len(ordered) and ordered[after].startswith(text[start:]):
            return text[:start], text[start:]
    return text, ""


def sort_stops(stops):  # -> in order, as a set, and their lengths: what until_stop takes
    return sorted(stops), set(stops), sorted({len(stop) for stop in stops})


def up_to(texts, stops):  # iterable of str -> iterable of str
    """Yields the text up to the first stop. Holds back what may still become a stop."""
    held, stops = "", sort_stops(stops)
    for text in texts:
        shown, held, is_complete = until_stop(held + text, len(text), stops)
        yield shown
        if is_complete:
            return
    yield held


def stops_with(stops, encoder):  # list of str -> stop(ids), as generate_stream takes it, or None
    """stop(ids): has the last token completed one of the strings?

    Every token has a byte or more, so only the last few tokens can hold the string. Bytes are
    compared, because a token may begin within a character. UTF-8 allows that: no character's bytes
    look like a part of another's.
    """
    wanted = [stop.encode() for stop in stops]
    n_longest = max(map(len, wanted), default=0)

    def stop(ids):
        tail = encoder.decode_bytes(ids[-n_longest:])
        return any(text in tail for text in wanted)

    return stop if wanted else None
