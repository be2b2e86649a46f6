"""`distmoe launch slurm`: train.sbatch with the values of a job, submitted by sbatch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from distmoe.launch.job import PYTHON, Job, Start

OPTIONS = (
    "--partition",
    "--account",
    "--time",
    "--array",
    "--max-restarts",
    "--max-requeues",
    "--grace",
)
HELP = """  --partition, --account, --time, --array VALUE    as sbatch has them
  --max-requeues Q      requeues after preemption or the time limit (default 100)
  --grace SECONDS       between the signal and the time limit (default 120)
  --max-restarts R      with --elastic: restarts of all ranks after one has failed (default 3)
"""
TEMPLATE = Path(__file__).with_name("train.sbatch")
SBATCH = re.compile(r"^#SBATCH --([\w-]+).*$", re.MULTILINE)


def prepare(job: Job) -> Start:
    """The script in the run's folder, and the sbatch that submits it."""
    folder = Path(job.config.run.dir) / "slurm"
    script = folder / "train.sbatch"
    text = render(TEMPLATE.read_text(), _directives(job, folder), _values(job))
    # sbatch does not make the folder of its log; writing the script beside it does.
    log = f"log: {folder}/{job.config.run.name}-JOB.out"
    return Start(("sbatch", *job.launcher_args, str(script)), {script: text}, (log,))


def render(template: str, directives: Mapping[str, str], values: Mapping[str, str]) -> str:
    """The script with ``directives`` for sbatch (empty: a switch) and ``values`` of variables."""
    left = dict(directives)

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        return _directive(name, left.pop(name)) if name in left else match[0]

    text = SBATCH.sub(replaced, template)
    last = list(SBATCH.finditer(text))[-1].end()
    added = "".join("\n" + _directive(name, value) for name, value in left.items())
    text = text[:last] + added + text[last:]
    for name, value in values.items():
        lines = re.findall(rf"^{name}=.*$", text, flags=re.MULTILINE)
        if len(lines) != 1:
            raise AssertionError(f"{name}= is in {len(lines)} lines of the template")
        text = text.replace(lines[0], f"{name}={value}")
    return text


def _directive(name: str, value: str) -> str:
    return f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"


def _directives(job: Job, folder: Path) -> dict[str, str]:
    config = job.config
    directives = {
        "job-name": config.run.name,
        "nodes": str(job.nodes),
        "output": f"{folder}/%x-%j.out",
        "signal": f"B:USR1@{_grace(job)}",
    }
    if config.run.device == "cuda":
        directives["gpus-per-node"] = str(job.ranks_per_node)
    if job.min_nodes is not None:
        directives["no-kill"] = ""
    for name in ("partition", "account", "time", "array"):
        if f"--{name}" in job.options:
            directives[name] = job.options[f"--{name}"]
    return directives


def _values(job: Job) -> dict[str, str]:
    """Shell variables of the template."""
    return {
        "RANKS_PER_NODE": str(job.ranks_per_node),
        "MIN_NODES": str(job.min_nodes or ""),
        "MAX_RESTARTS": str(job.integer("--max-restarts", 3)),
        "MAX_REQUEUES": str(job.integer("--max-requeues", 100)),
        "GRACE_S": str(_grace(job)),
        "PYTHON": f"({shlex.quote(PYTHON)})",
        "CONFIG": f"({shlex.join(job.arguments)})",
    }


def _grace(job: Job) -> int:
    return job.integer("--grace", 120, least=1)
