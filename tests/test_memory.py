"""plumbing/memory.py: what is free, on this machine and within a container's limit."""

import pytest

from plumbing import memory


def test_no_more_is_free_than_there_is():
    free = memory.free_bytes()
    if free is None:
        pytest.skip("only Linux says how much memory is free")
    with open("/proc/meminfo") as f:
        total = int(f.readline().split()[1]) * 1024
    assert 0 < free < total


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    """Also an outer one's; the pages of files that it could drop are free; "max" is no limit."""
    if memory.free_bytes() is None:
        pytest.skip("only Linux says how much memory is free")
    groups = [tmp_path, tmp_path / "outer", tmp_path / "outer" / "inner"]
    groups[-1].mkdir(parents=True)
    limits = zip(groups, ("max", 9_000_000, 12_000_000), (1, 5_000_000, 4_000_000), strict=True)
    for group, limit, used in limits:
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 7\ninactive_file 1000000\n")
    assert [memory.group_bytes(group) for group in groups] == [float("inf"), 5_000_000, 9_000_000]
    monkeypatch.setattr(memory, "control_groups", lambda: groups)
    assert memory.free_bytes() == 5_000_000
    assert memory.n_that_fit(9, n_bytes=500_000) == 5 and memory.n_that_fit(4, 500_000) == 4
    assert memory.n_that_fit(9, n_bytes=3_000_000) == 1  # at least
    assert memory.n_that_fit(9, n_bytes=100, free=500) == 2


def test_a_group_that_says_nothing_has_no_limit(tmp_path):
    assert memory.group_bytes(tmp_path / "missing") == float("inf")
