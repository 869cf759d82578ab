"""Finds out how much memory is free, so that defaults fit the machine."""

from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def n_that_fit(n, n_bytes, free=None):
    """Returns how many of n things, of n_bytes each, fit into half of the free memory, at least 1.

    free: the free bytes of a device's memory, by default this machine's.
    """
    free = free_bytes() if free is None else free
    return n if free is None else max(1, min(n, int(free / 2 / n_bytes)))


def free_bytes():
    """Returns the bytes that this process can still use without swapping, or None if unknown.

    They are known only on Linux. A container's limit counts if it is set by cgroups of version 2.
    """
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        free = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}["MemAvailable"]
    except (OSError, KeyError):
        return None
    return min([free, *(group_bytes(folder) for folder in control_groups())])


def control_groups():
    """Returns the folders of this process's control group and of its parents."""
    try:
        lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return []
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    return [GROUPS / parent for path in paths for parent in (Path(path), *Path(path).parents)]


def group_bytes(folder):  # -> the free bytes of a control group, infinite without a limit
    try:
        limit = int((folder / "memory.max").read_text("utf-8"))
        used = int((folder / "memory.current").read_text("utf-8"))
        stat = dict(
            line.split() for line in (folder / "memory.stat").read_text("utf-8").splitlines()
        )
    except (OSError, ValueError):  # no such file, or "max", which means no limit
        return float("inf")
    return max(0, limit - used + int(stat.get("inactive_file", 0)))  # cached files can be dropped
