import os
from pathlib import Path

from modpressure.memory import usable_memory_bytes

PHYSICAL_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_control_groups_it_is_all_of_the_machine(tmp_path: Path) -> None:
    assert usable_memory_bytes(tmp_path) == PHYSICAL_BYTES


def test_the_least_limit_of_the_group_and_those_above_counts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/service\n",
            "sys/fs/cgroup/user.slice/service/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/memory.max": "1048576\n",
        },
    )
    assert usable_memory_bytes(root) == 1048576
    write(root, {"sys/fs/cgroup/user.slice/service/memory.max": "4096\n"})
    assert usable_memory_bytes(root) == 4096


def test_a_container_that_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/memory.max": "2097152\n"},
    )
    assert usable_memory_bytes(root) == 2097152


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "8:pids:/x\n4:memory:/x\n0::/x\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "8192\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert usable_memory_bytes(root) == 8192


def test_a_limit_beyond_all_memory_is_none(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "9223372036854771712\n"})
    assert usable_memory_bytes(root) == PHYSICAL_BYTES
