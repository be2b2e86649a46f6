"""Ranks as processes: on this machine as it is, or on two hosts of it (network namespaces of one
tool's own, which need root) that are joined by a link of a given rate. Used by the tools here."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from distmoe.arguments import new_file
from distmoe.bench.tool import add_sizes, split_settings

LINKS = str(Path(__file__).with_name("links.sh"))
# Of the interface and of host 0, as links.sh makes them.
INTERFACE, FIRST_ADDRESS = "link0", "10.77.0.1"
QUIET = ["--optim.warmup_steps=0", "--train.validate_every=0", "--checkpoint.every=0"]
FIRST_PORT, PORTS = 20000, 20000
_job = count()


class FailedError(Exception):
    """Ranks ended badly."""


@dataclass(frozen=True)
class Hosts:
    """``name`` of the two for links.sh; "": this machine alone."""

    name: str

    @property
    def number(self) -> int:
        return 2 if self.name else 1

    def run_ranks(
        self,
        commands: Sequence[Sequence[str]],
        *,
        variables: dict[str, str] | None = None,
        output: IO[bytes] | None = None,
    ) -> bool:
        """A process for every rank, consecutive ones on one host; whether all of them ended well.
        They find each other by the variables of torchrun; ``variables`` are set beside them.
        ``output``: for what they print; None: as this process."""
        port = FIRST_PORT + (os.getpid() + next(_job)) % PORTS
        ranks: list[subprocess.Popen[bytes]] = []
        per_host = len(commands) // self.number
        try:
            for rank, command in enumerate(commands):
                environment = {
                    **os.environ,
                    **(variables or {}),
                    "RANK": str(rank),
                    "WORLD_SIZE": str(len(commands)),
                    "LOCAL_RANK": str(rank % per_host),
                    "LOCAL_WORLD_SIZE": str(per_host),
                    "MASTER_ADDR": FIRST_ADDRESS if self.name else "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                on_host = self._on_host(rank // per_host, command)
                ranks.append(_start(on_host, environment, output))
            return not any([process.wait() for process in ranks])
        finally:
            for process in ranks:
                process.kill()
                process.wait()

    def figures_of_ranks(
        self, number: int, command: Sequence[str], variables: dict[str, str]
    ) -> list[Any] | None:
        """What ``number`` ranks of ``command`` leave, each with its number as name and as JSON, in
        the folder that --folder names; None if one of them ended badly."""
        with TemporaryDirectory() as folder:
            each = [*command, "--folder", folder]
            if not self.run_ranks([each] * number, variables=variables):
                return None
            return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(number)]

    def run_distmoe(self, ranks: int, command: Sequence[str], output: Path) -> None:
        """`distmoe COMMAND` as all ranks; `FailedError` with the last lines of its ``output``."""
        threads = str(max(1, (os.cpu_count() or 1) // ranks))
        variables = {"OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        each = [sys.executable, "-m", "distmoe", *command]
        with output.open("wb") as file:
            ended_well = self.run_ranks([each] * ranks, variables=variables, output=file)
        if not ended_well:
            raise FailedError("\n".join(output.read_text().strip().splitlines()[-5:]))

    def train(
        self, arguments: argparse.Namespace, options: Sequence[str], run_dir: Path
    ) -> list[dict[str, Any]]:
        """A run of `run_arguments` with ``options``; the lines of its steps after the warm-up."""
        run_dir.mkdir()
        command = ["train", str(arguments.config), *QUIET, f"--run.dir={run_dir}"]
        command += [f"--train.steps={arguments.steps}", *options]
        self.run_distmoe(arguments.ranks, command, run_dir / "output.txt")
        return steps_after(arguments.warm_up, run_dir / "metrics.jsonl")

    def _on_host(self, host: int, command: Sequence[str]) -> list[str]:
        if not self.name:
            return list(command)
        return [LINKS, "exec", self.name, str(host), *command]


def _start(
    command: list[str], environment: dict[str, str], output: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def steps_after(warm_up: int, file: Path) -> list[dict[str, Any]]:
    """The lines of a run's later steps."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if line["step"] > warm_up]


@contextmanager
def hosts(mbit: int) -> Iterator[Hosts]:
    """Two hosts and a link of ``mbit`` Mbit/s between them, gone at the end, however that comes;
    with 0 this machine. CalledProcessError if they cannot be made."""
    if not mbit:
        yield Hosts("")
        return
    name = f"distmoe-{os.getpid()}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    subprocess.run([LINKS, "up", name, str(mbit)], check=True)
    try:
        yield Hosts(name)
    finally:
        subprocess.run([LINKS, "down", name], check=True)


def run_arguments(
    argv: Sequence[str] | None, description: str, sizes: Mapping[str, int]
) -> argparse.Namespace:
    """Of a tool that trains across two hosts: ``config``, the ``sizes`` (ranks, steps and warm-up
    among them) with these defaults, ``json``, and as ``options`` an ep of all ranks and what
    follows --. Ends the tool with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        description=description.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="What follows -- is given to every run.",
    )
    parser.add_argument("config", type=Path, help="TOML file of a run")
    add_sizes(parser, sizes)
    parser.add_argument("--json", type=new_file, help="file")
    own, settings = split_settings(argv)
    arguments = parser.parse_args(own)
    arguments.options = [f"--parallel.ep={arguments.ranks}", *settings]
    if not arguments.config.is_file():
        parser.error(f"config is {arguments.config}; there is no such file")
    if arguments.ranks % 2:
        parser.error(f"--ranks is {arguments.ranks}; two hosts need an even number")
    if arguments.steps <= arguments.warm_up:
        parser.error(
            f"--steps is {arguments.steps}; it must be above --warm-up ({arguments.warm_up})"
        )
    if os.geteuid() != 0:
        parser.error("two hosts of its own need root")
    return arguments
