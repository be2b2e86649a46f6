"""Cores, threads and memory of the host, as far as this process may use them."""

from __future__ import annotations

import os
from pathlib import Path

from distmoe.launch.doctor.cgroup import core_limit, memory_limit, process_limit
from distmoe.launch.doctor.finding import Finding, failed, passed, skipped, warned
from distmoe.launch.doctor.situation import Check, Situation

GIB = 1 << 30
# Feeding a GPU: Python, the thread that reads data, those of NCCL.
CORES_PER_RANK = 2
# A frequency policy that saves power adds latency to every kernel launch.
SAVING = ("powersave", "conservative")
LEAST_BYTES = 4 * GIB
# OpenMP, NCCL, data and checkpoints: threads count.
PROCESSES_PER_RANK = 100


def cores(situation: Situation) -> Finding:
    """That the machine has, that the process may run on, and that its cgroup gives it time on."""
    usable, whole = usable_cores(), os.cpu_count() or 1
    quota = core_limit()
    seen = f"{whole} in the machine, {len(os.sched_getaffinity(0))} may be used"
    seen += f", time for {quota:g} by the cgroup" if quota is not None else ""
    wanted = situation.local_world * (CORES_PER_RANK if situation.wants_gpu else 1)
    if usable < wanted:
        return warned(
            f"{seen}; {situation.local_world} ranks want {wanted}",
            "more cores: srun --cpus-per-task, docker --cpus, or fewer ranks",
        )
    return passed(seen)


def usable_cores() -> float:
    """By affinity and by the quota of the cgroup."""
    affinity, quota = len(os.sched_getaffinity(0)), core_limit()
    return affinity if quota is None else min(affinity, quota)


def threads(situation: Situation) -> Finding:
    """Of all ranks of this machine together, against the cores."""
    own = situation.config.launch.threads if situation.config else 0
    set_to = situation.variables.get("OMP_NUM_THREADS", "")
    each = own or (int(set_to) if set_to.isdecimal() else 0)
    source = "launch.threads" if own else "OMP_NUM_THREADS"
    if set_to and not set_to.isdecimal():
        return warned(f"OMP_NUM_THREADS is '{set_to}'", "export OMP_NUM_THREADS=N, or unset it")
    if not each:
        return passed("distmoe train and distmoe launch give each rank its share of the cores")
    all_threads, usable = each * situation.local_world, usable_cores()
    seen = f"{source} {each} x {situation.local_world} ranks on {usable:g} cores"
    if all_threads > usable:
        return warned(seen, f"{source} {max(1, int(usable // situation.local_world))}")
    return passed(seen)


def load(situation: Situation) -> Finding:
    """What others do with the cores now."""
    running, usable = os.getloadavg()[0], usable_cores()
    seen = f"{running:.1f} running processes on {usable:g} cores, in the last minute"
    if running > usable:
        return warned(seen, "figures of such a machine are of what the others leave")
    return passed(seen)


def memory(situation: Situation) -> Finding:
    """Of the host, that is available, and the limit of the cgroup."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:
        return skipped(str(error))
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    available, limit = kib["MemAvailable"] << 10, memory_limit()
    seen = f"{available / GIB:.1f} of {(kib['MemTotal'] << 10) / GIB:.1f} GiB available"
    if limit is not None:
        seen += f", at most {limit / GIB:.1f} GiB by the cgroup"
        available = min(available, limit)
    if available < LEAST_BYTES:
        return warned(seen, "more memory: srun --mem, docker --memory, or end other processes")
    return passed(seen)


def frequency(situation: Situation) -> Finding:
    """The governor of the cores."""
    files = list(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))
    if not files:
        return skipped("the kernel does not tell, as in most virtual machines")
    governors = sorted({file.read_text().strip() for file in files})
    if set(governors) & set(SAVING):
        return warned(", ".join(governors), "cpupower frequency-set -g performance")
    return passed(", ".join(governors))


def processes(situation: Situation) -> Finding:
    """And threads, that the cgroup allows."""
    limit = process_limit()
    if limit is None:
        return passed("no limit by the cgroup")
    wanted = PROCESSES_PER_RANK * situation.local_world
    if limit < wanted:
        return failed(f"at most {limit:,}; ranks want about {wanted:,}", "docker --pids-limit=-1")
    return passed(f"at most {limit:,}")


CHECKS: dict[str, Check] = {
    "cores": cores,
    "threads": threads,
    "load": load,
    "memory": memory,
    "frequency": frequency,
    "processes": processes,
}
