"""How much memory is free, so that a default need not be larger than the machine."""

from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def n_that_fit(n, n_bytes, free=None):
    """How many of n things, of n_bytes each, fit into half of the free memory. At least one.

    free: bytes, of a device's own memory. By default those of this machine.
    """
    free = free_bytes() if free is None else free
    return n if free is None else max(1, min(n, int(free / 2 / n_bytes)))


def free_bytes():
    """The bytes that this process can still use without swapping, or None if nobody says.

    Only Linux says. A container's limit counts, where cgroups of version 2 set it.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}["MemAvailable"]
    except (OSError, KeyError):
        return None
    return min([free, *(group_bytes(folder) for folder in control_groups())])


def control_groups():
    """The folders of this process's control group and of those around it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    paths = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    return [GROUPS / parent for path in paths for parent in (Path(path), *Path(path).parents)]


def group_bytes(folder):  # -> what is free in a control group; infinite without a limit
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such file, or "max", which is no limit
        return float("inf")
    return max(0, limit - used + int(stat.get("inactive_file", 0)))  # file pages can be dropped
