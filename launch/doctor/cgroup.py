"""Limits of the control groups that this process is in, of version 2 or 1.

A group's limit counts for all below it, so each is the least on the way up. A container mounts its
own group as the root, and may still tell the path that its host has for it: what is not there is
passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Version 1 writes a number near 2^63 for no limit.
NO_LIMIT = 1 << 60


def core_limit() -> float | None:
    """Cores' worth of time; None without a limit."""
    limits = []
    for folder, version in _groups("cpu"):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = " ".join(_text(folder / name) for name in names).split()
        if len(words) == 2 and words[0] not in ("max", "-1"):
            limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


def memory_limit() -> int | None:
    """Bytes; None without a limit."""
    return _least("memory", "memory.max", "memory.limit_in_bytes")


def process_limit() -> int | None:
    """Processes and threads; None without a limit."""
    return _least("pids", "pids.max", "pids.max")


def _least(controller: str, name: str, old_name: str) -> int | None:
    texts = (_text(g / (name if v == 2 else old_name)) for g, v in _groups(controller))
    numbers = (int(text) for text in texts if text not in ("", "max"))
    return min((number for number in numbers if number < NO_LIMIT), default=None)


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """Folders of this process's group and of those above it, with the version of each."""
    for line in _text(OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, version = ROOT, 2
        elif controller in controllers.split(","):
            base, version = ROOT / controller, 1
        else:
            continue
        group = PurePosixPath(path)
        for above in (group, *group.parents):
            yield base / above.relative_to("/"), version


def _text(file: Path) -> str:
    """Empty for a file that is not there."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
