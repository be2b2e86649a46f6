"""`distmoe launch deepspeed`: DeepSpeed's launcher, by ssh from one node or without it on each."""

from __future__ import annotations

from pathlib import Path

from distmoe.config import ConfigError
from distmoe.launch.job import PYTHON, Job, Start

OPTIONS = ("--hosts", "--master", "--node-rank")
HELP = """  --hosts A,B,...       the nodes, which `deepspeed` reaches by pdsh and ssh from here
  --node-rank R         without ssh: this machine, 0..N-1; the command is started on every node
  --master HOST[:PORT]  an address of node 0, with --node-rank (port: 29500)
"""
PORT = "29500"


def prepare(job: Job) -> Start:
    """The hostfile and the command; ConfigError for options that do not fit."""
    hosts = [host for host in job.options.get("--hosts", "").split(",") if host]
    if job.nodes == 1:
        return Start(_command(job, ()))
    if len(hosts) != job.nodes:
        raise ConfigError(
            f"--hosts is '{','.join(hosts)}'; it must name as many hosts as --nodes ({job.nodes})"
        )
    hostfile = Path(job.config.run.dir) / "hostfile"
    text = "".join(f"{host} slots={job.ranks_per_node}\n" for host in hosts)
    pool = (f"--hostfile={hostfile}", f"--num_nodes={job.nodes}")
    by_hand = _without_ssh(job, hosts[0]) if "--node-rank" in job.options else ()
    return Start(_command(job, (*pool, *by_hand)), {hostfile: text})


def _without_ssh(job: Job, first_host: str) -> tuple[str, ...]:
    node = job.integer("--node-rank", 0)
    if node >= job.nodes:
        raise ConfigError(f"--node-rank is {node}; it must be in 0..{job.nodes - 1}")
    host, _, port = job.options.get("--master", first_host).partition(":")
    where = (f"--master_addr={host}", f"--master_port={port or PORT}")
    return ("--no_ssh", f"--node_rank={node}", *where)


def _command(job: Job, options: tuple[str, ...]) -> tuple[str, ...]:
    # Its launcher looks for devices itself.
    accelerator = ("DS_ACCELERATOR=cpu",) if job.config.run.device == "cpu" else ()
    return (
        *job.environment(),
        *accelerator,
        *(PYTHON, "-m", "deepspeed.launcher.runner"),
        *(f"--num_accelerators={job.ranks_per_node}", *options, *job.launcher_args),
        # The rank is in the environment; an argument would be an unknown setting.
        *("--no_local_rank", "--module", *job.train_command()),
    )
