"""Guesses how a text continues: as it did after the last occurrence of its two last tokens.

A step of one row reads all the weights for one token, and takes little longer for five. So a pass
also checks four guesses, and keeps those that the model would have written. The text is the same,
and where it repeats itself or quotes its prompt, several tokens come at once. Saxena 2023, "Prompt
Lookup Decoding". Checking guesses in one pass is from Leviathan et al. 2023, arXiv:2211.17192,
where a smaller model makes the guesses.
"""

N_MATCHED = 2  # how many last tokens must have occurred earlier in the text
MOST_TRUST, REGAINED = 4, 1 / 16  # a text without repetition loses at most half a step in 16


def guess(ids, n):  # a list of ids -> n more, or none
    """Returns what followed the last occurrence of ids' end, repeated if it is shorter than n.

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
