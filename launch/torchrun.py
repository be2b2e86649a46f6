"""`distmoe launch torchrun`: the agent of one node, started on every node with the same options.

Jobs of a fixed size meet by a static rendezvous: rank 0 is on node 0, and a finished run ends
without noise. Elastic ones need c10d, where agents agree on who is here.
"""

from __future__ import annotations

from distmoe.config import ConfigError
from distmoe.launch.job import PYTHON, Job, Start

OPTIONS = ("--master", "--node-rank", "--max-restarts")
HELP = """  --master HOST[:PORT]  an address of node 0, with several nodes (port: 29500)
  --node-rank R         this machine, 0..N-1; not with --elastic
  --max-restarts R      restarts of all ranks after one has failed (default 0; --elastic: 3)
"""
PORT = 29500
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# Of torchrun's own signals USR1 is none: its agent would die and leave the ranks behind.
SIGNAL_OPTIONS = (f"--signals-to-handle={SIGNALS}", "--shutdown-timeout=120")
# With the store that is shared by default, agents that come later wait for ever (torch 2.13).
ELASTIC_VARIABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"


def prepare(job: Job) -> Start:
    """The command of this node; ConfigError for options that do not fit."""
    elastic = job.min_nodes is not None
    restarts = job.integer("--max-restarts", 3 if elastic else 0)
    if job.nodes > 1 and "--master" not in job.options:
        raise ConfigError(
            f"--master is not given; it must be an address of node 0, as --nodes is {job.nodes}"
        )
    if elastic:
        return Start(_command(job, restarts, _elastic(job)))
    if job.nodes == 1:
        return Start(_command(job, restarts, ("--standalone",)))
    if restarts:
        raise ConfigError("--max-restarts needs --elastic if --nodes is more than 1")
    commands = [_command(job, 0, _static(job, node)) for node in range(job.nodes)]
    if "--node-rank" in job.options:
        node = job.integer("--node-rank", 0)
        if node >= job.nodes:
            raise ConfigError(f"--node-rank is {node}; it must be in 0..{job.nodes - 1}")
        return Start(commands[node])
    return Start(commands[0], other_nodes=tuple(commands[1:]))


def _command(job: Job, restarts: int, meeting: tuple[str, ...]) -> tuple[str, ...]:
    return (
        *job.environment(),
        *((ELASTIC_VARIABLE,) if job.min_nodes is not None else ()),
        *(PYTHON, "-m", "torch.distributed.run"),
        *(f"--nproc-per-node={job.ranks_per_node}", *meeting, f"--max-restarts={restarts}"),
        *(*SIGNAL_OPTIONS, *job.launcher_args, "-m", *job.train_command()),
    )


def _static(job: Job, node: int) -> tuple[str, ...]:
    host, port = _master(job)
    where = (f"--master-addr={host}", f"--master-port={port}")
    return (f"--nnodes={job.nodes}", f"--node-rank={node}", *where)


def _elastic(job: Job) -> tuple[str, ...]:
    host, port = _master(job)
    nodes = f"--nnodes={job.min_nodes}:{job.nodes}"
    name = f"--rdzv-id={job.config.run.name}"
    return (nodes, "--rdzv-backend=c10d", name, f"--rdzv-endpoint={host}:{port}")


def _master(job: Job) -> tuple[str, int]:
    host, colon, port = job.options.get("--master", "127.0.0.1").rpartition(":")
    if not colon:
        return port, PORT
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--master is '{job.options['--master']}'; it must be HOST or HOST:PORT")
    return host, int(port)
