"""torchrun on two hosts with addresses of their own: one is lost, and the run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from links import on_host, slow_link
from slurm_cluster import wait_until
from training_runs import CONSTANT, config_file, learning, records

pytestmark = pytest.mark.processes

STEPS, LOST_AFTER = 40, 8
RUN = [*CONSTANT, f"--train.steps={STEPS}", "--checkpoint.every=4"]

# A host counts as lost after 3 s instead of 15. The hosts share a name, so that torchrun cannot
# find out by the address who serves the store.
OPTIONS = (
    "--monitor-interval=0.2 --local-addr=10.77.0.{number} "
    "--rdzv-conf=keep_alive_interval=1,last_call_timeout=1,is_host={first}"
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[str]:
    with slow_link(mbit=0) as name:
        yield name


def start_agent(hosts: str, host: int, config: Path, *options: str) -> subprocess.Popen[bytes]:
    """`distmoe launch torchrun --elastic` on a host; the process becomes the agent."""
    launch = ["launch", "torchrun", str(config), "--nodes=2", "--ranks-per-node=1", "--elastic"]
    agent = OPTIONS.format(number=host + 1, first=host == 0)
    launch += ["--master=10.77.0.1:29500", f"--launcher-args={agent}"]
    with (config.parent / f"host-{host}.log").open("a") as log:
        return subprocess.Popen(
            on_host(hosts, host, [sys.executable, "-m", "distmoe", *launch, *RUN, *options]),
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )


def said(config: Path) -> str:
    return "".join(path.read_text() for path in sorted(config.parent.glob("host-*.log")))


def test_killed_host_that_comes_back(
    hosts: str, long_run: Path, data: Path, tmp_path: Path
) -> None:
    """Experts on both hosts: the one that is left waits for the other."""
    config = config_file(tmp_path / "elastic", data)
    agents = [start_agent(hosts, host, config) for host in range(2)]
    try:
        wait_until(lambda: len(records(config)) >= LOST_AFTER, 120)
        agents[1].kill()
        agents[1].wait()
        agents[1] = start_agent(hosts, 1, config)
        codes = [agent.wait(timeout=180) for agent in agents]
        assert codes == [0, 0], said(config)
    finally:
        for agent in agents:
            agent.kill()
    assert "resumed from" in said(config)
    assert learning(config) == learning(long_run)[:STEPS]


def test_killed_host_that_stays_away(hosts: str, data: Path, tmp_path: Path) -> None:
    """All experts on each host: the one that is left goes on alone. Only the agent is killed, and
    its rank must go with it."""
    config = config_file(tmp_path / "smaller", data)
    agents = [start_agent(hosts, host, config, "--parallel.ep=1") for host in range(2)]
    try:
        wait_until(lambda: len(records(config)) >= LOST_AFTER, 120)
        agents[1].kill()
        assert agents[0].wait(timeout=180) == 0, said(config)
    finally:
        for agent in agents:
            agent.kill()
    assert "dp_replicate 1 x efsdp 2" in said(config)
    assert "mesh            1 rank" in said(config)
    assert len(records(config)) == STEPS
