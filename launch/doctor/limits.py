"""Limits of this shell (ulimit), which ranks inherit."""

from __future__ import annotations

import resource
from pathlib import Path

from distmoe.launch.doctor.finding import Finding, passed, warned
from distmoe.launch.doctor.situation import Check, Situation

KIB, MIB = 1 << 10, 1 << 20
# Connections to all ranks, shards of data and of checkpoints.
FILES = 4096
FILES_PER_RANK = 64
STACK = 8 * MIB
PROCESSES = 4096
INFINIBAND = Path("/sys/class/infiniband")


def files(situation: Situation) -> Finding:
    """Open at the same time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(FILES, FILES_PER_RANK * situation.world)
    seen = f"{_shown(soft)} open files (at most {_shown(hard)})"
    if _below(soft, wanted):
        return warned(seen, f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")
    return passed(seen)


def locked_memory(situation: Situation) -> Finding:
    """InfiniBand registers memory, which locks it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_infiniband = INFINIBAND.is_dir() and any(INFINIBAND.iterdir())
    if soft != resource.RLIM_INFINITY and has_infiniband:
        return warned(
            f"{_shown(soft // KIB)} KiB, and this machine has InfiniBand",
            "ulimit -l unlimited; docker --ulimit memlock=-1; SLURM: PropagateResourceLimits",
        )
    if soft == resource.RLIM_INFINITY:
        return passed("unlimited")
    return passed(f"{_shown(soft // KIB)} KiB; only InfiniBand needs more")


def core_files(situation: Situation) -> Finding:
    """What a crash leaves is as large as the rank's memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    pattern = Path("/proc/sys/kernel/core_pattern")
    target = pattern.read_text().strip() if pattern.is_file() else "core"
    if soft == 0 or target.startswith("|"):
        return passed("none" if soft == 0 else f"handed to {target[1:].split()[0]}")
    return warned(
        f"{_shown(soft)} bytes: a rank that crashes may fill the disk", "ulimit -c 0, unless wanted"
    )


def stack(situation: Situation) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    if _below(soft, STACK):
        return warned(f"{soft // KIB:,} KiB", f"ulimit -s {STACK // KIB}")
    return passed("unlimited" if soft == resource.RLIM_INFINITY else f"{soft // KIB:,} KiB")


def user_processes(situation: Situation) -> Finding:
    """And threads, of this user."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if _below(soft, PROCESSES):
        return warned(f"{_shown(soft)} processes and threads", f"ulimit -u {PROCESSES}")
    return passed(f"{_shown(soft)} processes and threads")


def _below(limit: int, wanted: int) -> bool:
    return limit != resource.RLIM_INFINITY and limit < wanted


def _shown(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


CHECKS: dict[str, Check] = {
    "open files": files,
    "locked memory": locked_memory,
    "core files": core_files,
    "stack": stack,
    "user processes": user_processes,
}
