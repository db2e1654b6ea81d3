"""What the kernel knows of processes: who dies with whom, what they used, and whether memory ran out.

Linux only. Everything reads procfs or makes one system call; nothing is started here.
"""

import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Ask the kernel to send `signum` to this process when the thread that started it ends.

    Raises `ProcessLookupError` when `parent` is already gone: the request would never be answered.
    """
    if _libc.prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        raise ProcessLookupError(f"parent {parent} is gone, this process now belongs to {os.getppid()}")


def signal_group(leader: int, signum: int) -> bool:
    """Send `signum` to the process group that `leader` heads; False when no such group is left."""
    try:
        os.killpg(leader, signum)
    except ProcessLookupError:
        return False
    return True


def is_alive(pid: int) -> bool:
    """Whether `pid` is a process that still runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def marked(name: str, value: str) -> Iterator[int]:
    """Yield the live processes but this one that were started with `name=value` in their environment."""
    entry = f"{name}={value}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:  # gone meanwhile, or another user's
            continue
        if entry in environment.split(b"\0") and is_alive(int(folder.name)):
            yield int(folder.name)


def peak_memory(pid: int) -> int:
    """Peak resident bytes of a live process so far (VmHWM); 0 once it is gone."""
    return _status_bytes(pid, "VmHWM")


def _status_bytes(pid: int, field: str) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed for memory: in our control groups and in all."""
    kills = [_counter(folder / file) for folder in _memory_groups() for file in _MEMORY_EVENTS]
    return sum(kills) + _counter(Path("/proc/vmstat"))


_MEMORY_EVENTS = ("memory.events", "memory.oom_control")  # control groups v2, v1


def _counter(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _memory_groups() -> Iterator[Path]:
    """Yield the folders of this process's memory control group: v1 and v2, as seen here."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = Path("/sys/fs/cgroup") / controllers
        # inside a container the group's own path is not visible, its root is the mount point
        for folder in (base / group.lstrip("/"), base):
            if folder.is_dir():
                yield folder
                break


def memory_total() -> int:
    """Bytes of memory this process may use at all: the machine's, or its control group's if that is less."""
    return min([_meminfo("MemTotal"), *_group_values("memory.max", "memory.limit_in_bytes")])


def memory_available() -> int:
    """Bytes that can be allocated now without swapping or being killed."""
    room = [_meminfo("MemAvailable")]
    for folder in _memory_groups():
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                room.append(max(0, most - used + _file_cache(folder)))
    return min(room)


def _file_cache(group: Path) -> int:
    """Bytes a control group is charged for that the kernel gives up before it kills anyone."""
    for line in (group / "memory.stat").read_text().splitlines():
        name, value = line.split()
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {field}")


def _group_values(*names: str) -> list[int]:
    values = [_number(folder / name) for folder in _memory_groups() for name in names]
    return [value for value in values if value is not None]


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)
