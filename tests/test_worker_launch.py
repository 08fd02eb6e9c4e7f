"""The environment of a worker: huge pages are asked for, and what the user set stays."""

from dgnd.workers.launch import worker_environment


def test_huge_pages_are_asked_for_and_a_choice_is_kept() -> None:
    ours = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "GOMP_SPINCOUNT": "1000"}
    assert worker_environment({"A": "1"}) == {"A": "1", **ours}
    chosen = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "GOMP_SPINCOUNT": "30000000000"}
    assert worker_environment(chosen) == chosen
    other = worker_environment({"GLIBC_TUNABLES": "glibc.malloc.check=1"})
    assert other["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"
    assert "GOMP_SPINCOUNT" not in worker_environment({"OMP_WAIT_POLICY": "active"})
    assert "PATH" in worker_environment()
