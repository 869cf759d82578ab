"""Stop strings: a text that comes in parts, shown up to the first of them and no further."""


def until_stop(held, stops):  # -> (what may be shown, what is held back, is a stop complete?)
    """Cuts off the first stop in `held`. What may be the beginning of one is held back.

    >>> until_stop("Yes. EN", ["END"]), until_stop("Yes. END of", ["END"])
    (('Yes. ', 'EN', False), ('Yes. ', '', True))
    """
    found = [held.index(stop) for stop in stops if stop in held]
    if found:
        return held[: min(found)], "", True
    beginnings = (stop[:n] for stop in stops for n in range(1, len(stop)))
    n_held = max((len(part) for part in beginnings if held.endswith(part)), default=0)
    return held[: len(held) - n_held], held[len(held) - n_held :], False


def up_to(texts, stops):  # iterable of str -> iterable of str
    """The stream up to the first of `stops`. What may be one's beginning is held back till then."""
    held = ""
    for text in texts:
        shown, held, is_complete = until_stop(held + text, stops)
        if is_complete:
            held = shown
            break
        yield shown
    yield held
