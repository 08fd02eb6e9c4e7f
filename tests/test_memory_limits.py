"""What a node may hold: limits of control groups, amounts as people write them, and whether blocks fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgn_backends.span import Span
from dgnd.config.amount import AmountError, parse_amount
from dgnd.memory.cgroups import memory_groups
from dgnd.memory.fitting import refusal
from dgnd.worker.kv_budget import PAGE_POSITIONS, KVBudget

MIB = 1 << 20
NO_LIMIT = "9223372036854771712"


def first(tmp_path: Path, groups: dict[str, tuple[str, int]], mine: str, root: str = "/") -> Path:
    """A /proc of a process in the group `mine` of a hierarchy of version 1; groups: limit and bytes used, of
    which 10 MiB are page cache."""
    mount = tmp_path / "memory"
    for path, (limit, used) in groups.items():
        directory = mount / path.strip("/")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (directory / "memory.usage_in_bytes").write_text(f"{used + 10 * MIB}\n")
        (directory / "memory.stat").write_text(f"cache 0\ntotal_cache {10 * MIB}\ntotal_shmem 0\n")
    mountinfo = f"35 31 0:32 {root} {mount} rw,relatime - cgroup cgroup rw,memory\n"
    return proc(tmp_path, mountinfo, f"9:name=systemd:/\n4:cpu,memory:{mine}\n0::/\n")


def second(tmp_path: Path, groups: dict[str, tuple[str, int]], mine: str) -> Path:
    """The same in version 2."""
    mount = tmp_path / "unified hierarchy"
    for path, (limit, used) in groups.items():
        directory = mount / path.strip("/")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.high").write_text("max\n")
        (directory / "memory.current").write_text(f"{used + 10 * MIB}\n")
        (directory / "memory.stat").write_text(f"anon 1\nfile {11 * MIB}\nshmem {MIB}\n")
    shown = str(mount).replace(" ", "\\040")
    return proc(tmp_path, f"41 31 0:38 / {shown} rw - cgroup2 cgroup2 rw\n", f"0::{mine}\n")


def proc(tmp_path: Path, mountinfo: str, cgroup: str) -> Path:
    directory = tmp_path / "proc"
    directory.mkdir()
    (directory / "mountinfo").write_text(f"1 0 0:1 / / rw - ext4 /dev/x rw\n{mountinfo}")
    (directory / "cgroup").write_text(cgroup)
    return directory


@pytest.mark.parametrize("version", [first, second])
def test_every_limit_above_the_process_counts(tmp_path: Path, version: object) -> None:
    none = "max" if version is second else NO_LIMIT
    groups = {
        "/": (none, 0),
        "/a": (f"{300 * MIB}", 250 * MIB),
        "/a/b": (none, 9),
        "/a/b/c": (f"{400 * MIB}", MIB),
    }
    assert callable(version)
    found = memory_groups(version(tmp_path, groups, "/a/b/c"))
    assert {(group.name, group.limit // MIB, group.free // MIB) for group in found} == {
        ("/a", 300, 50),
        ("/a/b/c", 400, 399),
    }


def test_a_container_sees_its_own_limit_at_the_mount(tmp_path: Path) -> None:
    """Its path is that of the host, of which only the container's part is mounted."""
    found = memory_groups(first(tmp_path, {"/": (f"{MIB}", 0)}, "/docker/x", root="/docker/x"))
    assert [(group.name, group.limit) for group in found] == [("/", MIB)]


def test_a_path_from_another_namespace_still_has_what_is_mounted(tmp_path: Path) -> None:
    found = memory_groups(first(tmp_path, {"/": (f"{MIB}", 0)}, "/../elsewhere"))
    assert [group.limit for group in found] == [MIB]


def test_what_the_system_does_not_say_limits_nothing(tmp_path: Path) -> None:
    assert memory_groups(tmp_path / "nowhere") == []
    broken = first(tmp_path, {"/": ("not a number", 0)}, "/")
    assert memory_groups(broken) == []


@pytest.mark.parametrize(
    ("text", "of_8_gib"),
    [("6GiB", 6 << 30), ("60%", int(0.6 * (8 << 30))), ("1.5 GB", 1_500_000_000), ("100%", 8 << 30),
     ("512mib", 512 << 20), ("7 B", 7), ("20GiB", 8 << 30), ("0.5%", int(0.005 * (8 << 30)))],
)  # fmt: skip
def test_amounts(text: str, of_8_gib: int) -> None:
    assert parse_amount(text).of(8 << 30) == of_8_gib


@pytest.mark.parametrize("text", ["", "6", "6 gigs", "101%", "0%", "-1GiB", "0.1B", "1e9B", "nan%", "6GiB 1"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(AmountError, match="memory"):
        parse_amount(text)


BLOCK = 100 * MIB


def needs(span: Span, quant: str) -> int:
    """A model whose blocks take 100 MiB, half of that in int8, a quarter in int4; its ends nothing."""
    return (span.stop - span.start) * BLOCK // {"none": 1, "int8": 2, "int4": 4}[quant]


WHOLE = Span(0, 20, embed=True, head=True)


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (20 * BLOCK, ""),
        (20 * BLOCK - 1, "needs 2.0 GiB, 2.0 GiB free: embed,0-18 fit; as int8 all fit in 1000.0 MiB"),
        (7 * BLOCK, "needs 2.0 GiB, 700.0 MiB free: embed,0-6 fit; as int4 all fit in 500.0 MiB"),
        (2 * BLOCK, "needs 2.0 GiB, 200.0 MiB free: embed,0-1 fit"),
        (MIB, "needs 2.0 GiB, 1.0 MiB free: not one block fits"),
        (-5, "needs 2.0 GiB, 0 B free: not one block fits"),
    ],
)
def test_what_does_not_fit_is_said_with_what_would(free: int, said: str) -> None:
    assert refusal([WHOLE], "none", 20, free, needs) == said


def test_of_blocks_alone_it_says_which_blocks() -> None:
    said = refusal([Span(3, 13)], "none", 20, 4 * BLOCK, needs)
    assert said == "needs 1000.0 MiB, 400.0 MiB free: blocks 3-6 fit; as int4 all fit in 250.0 MiB"


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    busy=st.sets(st.integers(0, 11)),
    limit=st.integers(0, 40),
)
def test_a_smaller_budget_frees_idle_sequences_and_no_busy_one(
    sizes: list[int], busy: set[int], limit: int
) -> None:
    budget: KVBudget[int] = KVBudget(0)
    for key, pages in enumerate(sizes):
        budget.reserve(key, pages * PAGE_POSITIONS, 1, 10**6)
        if key not in busy:
            budget.idle(key)
    before = budget.busy_bytes
    gone = budget.limit(limit * PAGE_POSITIONS)
    assert not set(gone) & busy
    assert budget.busy_bytes == before
    assert gone == sorted(gone)  # the longest idle first
    if limit:
        assert budget.held <= limit * PAGE_POSITIONS or budget.held == before
