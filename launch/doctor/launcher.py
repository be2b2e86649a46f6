"""What torchrun, MPI or SLURM have said: ranks, and the tasks of a SLURM job against its GPUs."""

from __future__ import annotations

import re
import subprocess

from distmoe.launch.doctor.finding import Finding, failed, passed, skipped, warned
from distmoe.launch.doctor.probes import ProbeError
from distmoe.launch.doctor.situation import Check, Situation

SECONDS = 5.0
NO_JOB = "not in a SLURM job"


def ranks(situation: Situation) -> Finding:
    """The place of this process."""
    if situation.launcher_problem:
        return failed(situation.launcher_problem, "start by a launcher, or unset its variables")
    found = situation.ranks
    if found.source == "single":
        return passed("no launcher: distmoe train starts launch.nproc ranks itself")
    return passed(
        f"{found.source}: rank {found.rank} of {found.world}, {found.local_world} on this machine, "
        f"meeting at {found.master_addr}:{found.master_port}"
    )


def slurm_step(situation: Situation) -> Finding:
    """Tasks of the job's step: they are ranks, or one a node, in which torchrun starts ranks."""
    variables = situation.variables
    if "SLURM_JOB_ID" not in variables:
        return skipped(NO_JOB)
    if "SLURM_STEP_ID" not in variables:
        return passed(f"job {variables['SLURM_JOB_ID']}, outside of srun: this is one process")
    tasks = variables.get("SLURM_STEP_NUM_TASKS") or variables.get("SLURM_NTASKS", "1")
    nodes = variables.get("SLURM_STEP_NUM_NODES") or variables.get("SLURM_NNODES", "1")
    seen = f"{tasks} tasks on {nodes} nodes"
    place = variables.get("SLURM_PROCID", "")
    if not place.isdecimal() or int(place) >= int(tasks):
        return failed(f"{seen}, and SLURM_PROCID is '{place}'", "start by srun, or unset SLURM_*")
    return passed(seen)


def slurm_gpus(situation: Situation) -> Finding:
    """A task a GPU, or one task a node; every rank sees the GPUs of all ranks of its node."""
    variables = situation.variables
    if "SLURM_JOB_ID" not in variables:
        return skipped(NO_JOB)
    tasks = situation.ranks.local_world if situation.ranks.source == "slurm" else 1
    each = variables.get("SLURM_GPUS_PER_TASK")
    # With --gpu-bind=none a task sees those of the others, too.
    if each is not None and tasks > 1 and _gpus_seen(situation) < tasks:
        return failed(
            f"SLURM_GPUS_PER_TASK is {each}: a rank sees {_gpus_seen(situation)} GPUs, and must "
            f"see those of all {tasks} ranks of its node",
            "--gpus-per-node instead of --gpus-per-task",
        )
    gpus = _gpus_on_node(situation)
    if not gpus:
        return skipped("the job has no GPUs here")
    started = situation.ranks.source not in ("single", "slurm")
    seen = f"{tasks} tasks and {gpus} GPUs on this node"
    if tasks > gpus:
        return failed(seen, f"srun --ntasks-per-node={gpus}")
    if tasks < gpus and not started:
        return warned(
            seen, f"torchrun in one task a node (distmoe launch slurm), or --ntasks-per-node={gpus}"
        )
    return passed(seen)


def _gpus_on_node(situation: Situation) -> int:
    """By SLURM; else as many as torch sees."""
    text = situation.variables.get("SLURM_GPUS_ON_NODE", "")
    if text.isdecimal():
        return int(text)
    return _gpus_seen(situation)


def _gpus_seen(situation: Situation) -> int:
    """By torch, in this process's place."""
    try:
        return len(situation.probes.answer("torch")["devices"])
    except ProbeError:
        return 0


def slurm_cores(situation: Situation) -> Finding:
    """srun does not take --cpus-per-task over from sbatch."""
    variables = situation.variables
    if "SLURM_JOB_ID" not in variables:
        return skipped(NO_JOB)
    each = variables.get("SLURM_CPUS_PER_TASK")
    if each is None:
        return passed("--cpus-per-task is not set; `cores` says what this task has")
    if "SRUN_CPUS_PER_TASK" not in variables and "SLURM_STEP_ID" not in variables:
        return warned(f"{each} a task, of which srun knows nothing", "export SRUN_CPUS_PER_TASK")
    return passed(f"{each} a task")


def slurm_requeue(situation: Situation) -> Finding:
    """Whether SLURM may queue the job again, after preemption and when it asks for it."""
    job = situation.variables.get("SLURM_JOB_ID")
    if job is None:
        return skipped(NO_JOB)
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", job],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return skipped(f"scontrol does not tell: {error}")
    allowed = re.search(r"\bRequeue=(\d)", done.stdout)
    if allowed is None:
        return skipped(f"scontrol does not tell: {done.stderr.strip() or 'no Requeue='}")
    if allowed[1] == "0":
        return warned("the job is not queued again when it is preempted", "sbatch --requeue")
    return passed("the job may be queued again")


CHECKS: dict[str, Check] = {
    "ranks": ranks,
    "SLURM step": slurm_step,
    "SLURM GPUs": slurm_gpus,
    "SLURM cores": slurm_cores,
    "SLURM requeue": slurm_requeue,
}
