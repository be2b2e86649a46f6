"""Libraries between ranks: gloo and NCCL by really starting a group, MPI by starting it alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from distmoe.launch.doctor.finding import Finding, failed, passed, skipped, warned
from distmoe.launch.doctor.probes import COMMAND, ProbeError
from distmoe.launch.doctor.situation import Check, Situation
from distmoe.launch.env import lone_environment

SECONDS = 6.0
"""For a program that is asked something."""
# Wall clocks of ranks may differ by so much before logs and traces are hard to read together.
CLOCK_SECONDS = 0.1
FAMILIES = ("Open MPI", "MPICH", "Intel(R) MPI", "MVAPICH")
# Plug-ins of srun by which MPI libraries find their peers.
PLUGINS = ("pmix", "pmi2", "cray_shasta")


def gloo(situation: Situation) -> Finding:
    """A group of the ranks that a launcher has started, or of one."""
    try:
        answer = situation.probes.answer("gloo")
    except ProbeError as error:
        return failed(str(error), "GLOO_SOCKET_IFNAME=INTERFACE; see `network` below")
    number = answer["ranks"]
    ranks = "1 rank" if number == 1 else f"{number:,} ranks"
    return passed(f"{ranks} met and added up ones in {1e3 * answer['seconds']:,.1f} ms")


def nccl(situation: Situation) -> Finding:
    """A group of one rank on its GPU; links between ranks: `distmoe doctor comm`."""
    try:
        facts = situation.probes.answer("torch")
        if not facts["devices"]:
            return skipped("no GPU here")
        if facts["nccl"] is None:
            return failed("this torch is built without NCCL", "pip install torch with CUDA")
        seconds = situation.probes.answer("nccl")["seconds"]
    except ProbeError as error:
        return failed(str(error), "NCCL_DEBUG=INFO distmoe doctor comm says more")
    return passed(f"{facts['nccl']}; 1 rank added up ones on its GPU in {seconds:.2f} s")


def mpi4py(situation: Situation) -> Finding:
    """Which library it loads, and whether that starts."""
    command = [*COMMAND, "--mpi"]
    try:
        done = subprocess.run(
            command, env=lone_environment(), capture_output=True, text=True, timeout=SECONDS
        )
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["answer"]
    except subprocess.TimeoutExpired:
        return failed(f"MPI has not started in {SECONDS:g} s", "load the MPI of mpi4py")
    except (IndexError, ValueError):
        return failed("MPI ended the process that started it", "pip install mpich, or its MPI")
    if "No module named 'mpi4py'" in answer.get("error", ""):
        return skipped("mpi4py is not installed; for MPI: pip install 'distmoe[mpi]'")
    if "error" in answer:
        return failed(answer["error"], "pip install mpich, or load a module with MPI")
    return passed(f"loads {answer['library']}")


def mpiexec(situation: Situation) -> Finding:
    """Of the same family as the library of mpi4py, or every process believes to be alone."""
    beside = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
    program = beside or shutil.which("mpiexec")
    if program is None:
        return skipped("there is no mpiexec here")
    done = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    family = _family(done.stdout)
    library = mpi4py(situation).seen
    if family and _family(library) and family != _family(library):
        return failed(
            f"{program} is of {family}, and mpi4py {library}", "take the mpiexec of that library"
        )
    return passed(f"{program}{f', {family}' if family else ''}")


def _family(text: str) -> str:
    """Hydra is MPICH's mpiexec, OpenRTE that of old Open MPIs."""
    if "HYDRA" in text:
        return "MPICH"
    return "Open MPI" if "OpenRTE" in text else next((f for f in FAMILIES if f in text), "")


def srun_plugins(situation: Situation) -> Finding:
    """By which ranks that srun starts find each other in MPI."""
    if shutil.which("srun") is None:
        return skipped("there is no srun here")
    done = subprocess.run(
        ["srun", "--mpi=list"], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        why = done.stderr.strip() or f"exit code {done.returncode}"
        return skipped(f"srun does not tell: {why.splitlines()[-1]}")
    words = re.findall(r"\w+", done.stdout + done.stderr)
    found = sorted({word for word in words if word.startswith(PLUGINS)})
    if not found:
        return warned(
            f"srun has none of {', '.join(PLUGINS)}", "distmoe launch slurm, which needs no MPI"
        )
    return passed(f"srun --mpi= {', '.join(found)}")


def wall_clocks(situation: Situation) -> Finding:
    """Of all ranks, after a barrier."""
    if situation.ranks.world == 1:
        return skipped("one rank; under a launcher clocks of all ranks are compared")
    try:
        clocks = situation.probes.answer("gloo")["clocks"]
    except ProbeError as error:
        return skipped(f"the ranks do not meet: {error}")
    (first, earliest), (last, latest) = (
        pick(clocks, key=lambda clock: clock[1]) for pick in (min, max)
    )
    apart = f"at most {1e3 * (latest - earliest):,.1f} ms apart"
    if latest - earliest > CLOCK_SECONDS:
        return warned(f"{apart}: {first} is behind {last}", "have NTP or chrony set the clocks")
    return passed(f"{apart}, {len(clocks)} ranks")


CHECKS: dict[str, Check] = {
    "gloo": gloo,
    "nccl": nccl,
    "mpi4py": mpi4py,
    "mpiexec": mpiexec,
    "srun plug-ins": srun_plugins,
    "wall clocks": wall_clocks,
}
