"""Reports the result of a comparison, to people as text and to programs as JSON."""

import math

from checking import names
from plumbing.cli import count


def where(verdict):  # the line of gpt2.py that makes the first tensor that differs
    return names.source(verdict.first.entry.name, verdict.case.backprop)


def text(verdict, source):  # -> a few lines
    n, dtype = len(verdict.differences), verdict.case.dtype
    first = verdict.first
    if first is None:
        d = verdict.differences
        span = d[0].entry.name if n == 1 else f"{d[0].entry.name} to {d[-1].entry.name}"
        agree = "agrees" if n == 1 else "agree"
        return f"{source}: {count(n, 'tensor')} {agree} with gpt2.py in {dtype}, {span}"
    line = where(verdict)
    name = first.entry.name
    theirs = "" if first.entry.theirs == name else f" (theirs: {first.entry.theirs})"
    n_before = next(i for i, d in enumerate(verdict.differences) if d is first)
    n_agree = sum(d.agrees for d in verdict.differences)
    lines = [
        f"{source}: {n_agree} of {count(n, 'tensor')} agree in {dtype}; "
        f"the first that differs, after {n_before}, is {name}{theirs}",
        f"  made by  {line.function}, {line.file}:{line.line}: {line.text}",
        f"  error    {error(first)}",
        f"  cause    {cause(verdict.cause)}",
    ]
    return "\n".join(lines)


def error(d):
    if not math.isfinite(d.theirs.rms):
        return f"one of the two is infinite at {list(d.theirs.place)}, but not the other"
    times = d.theirs.rms / d.ours.rms if d.ours.rms else math.inf
    farther = f", {times:.0f} times as far as gpt2.py" if 1 < times < math.inf else ""
    return (
        f"{d.theirs.rms:.1e} from the float64 twin (root mean square){farther}; "
        f"rounding explains {d.limit.rms:.1e}; largest {d.theirs.largest:.1e} at "
        f"{list(d.theirs.place)}"
    )


def cause(found):
    if found is None:
        return "not found; none of the common mistakes gives this tensor"
    if found.is_close:
        return (
            f"not found; the closest is: {found.text}. Recomputed with this mistake, "
            f"{found.share:.0%} of the error is left, so there may be a second mistake"
        )
    after = found.n_after - 1
    if after == 0:
        return f"{found.text}. {found.evidence}"
    rest = "all" if found.n_same == found.n_after else f"{found.n_same - 1} of"
    return f"{found.text}. {found.evidence}, and so do {rest} the {after} after it"


def data(verdict):  # -> a dict for JSON
    first, found = verdict.first, verdict.cause
    result = {
        "agree": first is None,
        "dtype": verdict.case.dtype,
        "n_compared": len(verdict.differences),
        "first": None,
        "cause": None,
        "tensors": [
            {
                "name": d.entry.name,
                "theirs": d.entry.theirs,
                "agrees": d.agrees,
                "error": finite(d.theirs.rms),
                "largest": finite(d.theirs.largest),
                "ours": finite(d.ours.rms),
                "allowed": finite(d.limit.rms),
            }
            for d in verdict.differences
        ],
    }
    if first:
        line = where(verdict)
        result["first"] = {
            "name": first.entry.name,
            "theirs": first.entry.theirs,
            "function": line.function,
            "file": line.file,
            "line": line.line,
            "place": list(first.theirs.place),
        }
    if found:
        result["cause"] = {
            "text": found.text,
            "reproduces": not found.is_close,
            "n_same": found.n_same,
            "n_after": found.n_after,
        }
    return result


def finite(x):  # JSON has no infinity
    return x if math.isfinite(x) else None
