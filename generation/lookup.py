"""Guesses how a text goes on: as it did the last time its last few tokens stood in it.

A step of one row reads all the weights for one token. For five tokens it takes little longer; so
let a pass check four guesses beside its own token, and keep those that the model would have
written. The text is the same, and where it repeats itself or quotes its prompt, several tokens come
at once. Saxena 2023, "Prompt Lookup Decoding"; checking guesses in one pass is Leviathan et al.
2023, arXiv:2211.17192, whose guesses come from a smaller model.
"""

N_MATCHED = 2  # last tokens that must stand earlier in the text
MOST_TRUST, REGAINED = 4, 1 / 16  # a text that repeats nothing loses half a step in 16 at the most


def guess(ids, n):  # a list of ids -> n more, or none
    """What followed the last place that equals the end of ids, repeated if it is shorter than n.

    >>> guess([7, 1, 2, 3, 4, 5, 1, 2, 3], n=4)
    [4, 5, 1, 2]
    >>> guess([9, 8, 8, 8, 8], n=3)
    [8, 8, 8]
    >>> guess([1, 2, 3, 4], n=3)
    []
    """
    end = ids[-N_MATCHED:]
    for start in range(len(ids) - N_MATCHED - 1, -1, -1):
        if ids[start] == end[0] and ids[start : start + N_MATCHED] == end:
            return (ids[start + N_MATCHED :] * n)[:n]
    return []


def new_trust(trust, n_guessed, n_right):
    """Guesses are made while trust is 1 or more. A wrong guess costs 1, each right one adds 1."""
    if n_guessed == 0:
        return min(trust + REGAINED, MOST_TRUST)
    return min(trust + n_right - 1, MOST_TRUST)
