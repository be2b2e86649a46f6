"""`distmoe doctor comm` as a user starts it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from links import on_host, slow_link
from warm_python import run_python

from distmoe.launch import cli
from distmoe.planner import measure_device
from distmoe.planner.machine_profile import load_profile

COMMAND = [sys.executable, "-m", "distmoe", "doctor", "comm"]
SMALL = ["--moe.num_experts=4", "--moe.rounding.tile=16", "--launch.threads=1"]
SMALL += ["--train.global_batch_size=2", "--data.seq_len=64"]


@pytest.mark.processes
def test_two_ranks(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "o.json"), f"--save={tmp_path / 'machine.toml'}"]
    done = run_python("-m", "distmoe", "doctor", "comm", "--nproc=2", *files, *SMALL)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split() == "ranks class alpha us beta MB/s one pair MB/s worst pair".split()
    assert rows[1].split()[:2] == ["2", "node"]
    figures = json.loads((tmp_path / "o.json").read_text())
    (link,) = figures["links"]
    assert sorted(link["worst"][:2]) == [0, 1]
    assert [size for size, _ in link["curve"]][0] == 1024
    assert all(seconds > 0 for _, seconds in link["curve"])
    profile = load_profile(tmp_path / "machine.toml")
    assert set(profile.links) == {"own", "node"}
    assert profile.link("node").bytes_per_s == link["fit"]["bytes_per_s"] > 0
    assert min(figures["gemm_flops"]) <= profile.gemm_flops["fp32"] <= max(figures["gemm_flops"])
    assert profile.host_latency_s == figures["launch_s"] > 0
    assert profile.origin.device == figures["where"]["device"]
    # What a plan needs: two ranks on one node, each with half of the machine's memory.
    assert profile.ranks_per_node == 2
    assert set(profile.collective_share) == set(figures["collective_s"]) == {"gather", "reduce"}
    assert all(0 < share <= 1 for share in profile.collective_share.values())
    assert 0 < 2 * profile.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert profile.dense_flops == {"fp32": figures["dense_flops"]}
    assert profile.attention_flops == {"fp32": figures["attention_flops"]}
    assert min(figures["dense_flops"], figures["attention_flops"]) > 1e6


@pytest.fixture
def own_sigint() -> Iterator[None]:
    """Gives back the handler that a rank takes away."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("own_sigint")
def test_one_rank_measures_products_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_device, "PROBE_FLOPS", {"cpu": 1e7})
    monkeypatch.setattr(measure_device, "BUDGET_S", 0.01)
    file = tmp_path / "machine.toml"
    assert cli.main(["doctor", "comm", *SMALL, "--save", str(file)]) == 0
    assert "1: there are no links to measure" in capsys.readouterr().out
    profile = load_profile(file)
    assert set(profile.links) == {"own"}
    assert profile.gemm_flops["fp32"] > 0


@pytest.mark.processes
def test_rate_of_a_slow_link(tmp_path: Path) -> None:
    """200 Mbit/s are 25 MB/s, of which headers take 4 %."""
    with slow_link(mbit=200) as name:
        ranks = []
        for rank in range(2):
            place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
            place |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": 29500}
            environment = os.environ | {key: str(value) for key, value in place.items()}
            command = [*COMMAND, *SMALL, "--json", str(tmp_path / "o.json")]
            ranks.append(subprocess.Popen(on_host(name, rank, command), env=environment))
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    (link,) = json.loads((tmp_path / "o.json").read_text())["links"]
    assert link["name"] == "remote"
    assert link["fit"]["bytes_per_s"] == pytest.approx(25e6, rel=0.1)
    assert link["alone"]["bytes_per_s"] == pytest.approx(25e6, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["comm", "no.toml"], "there is no config file 'no.toml'"),
        (["comm", "--nproc", "0"], "--nproc is '0'; it must be an integer, at least 1"),
        (["comm", "--nproc"], "--nproc needs a value"),
        (
            ["comm", "--nproc=4", "--ranks-per-node=3"],
            "--ranks-per-node is 3; it must divide the number of ranks (4)",
        ),
        (["comm", "--save", "no/folder/x"], "--save is 'no/folder/x'; it must be a file in"),
        (["comm", "--moe.num_expert=4"], "did you mean 'moe.num_experts'?"),
        (["comm", "--moe.rounding.tile=0"], "moe.rounding.tile is 0; it must be at least 1"),
        (
            ["comm", "--nproc=2", "--moe.dispatch.exchange=local"],
            "moe.dispatch.exchange is local; it must be auto, p2p or all_to_all for 2 ranks",
        ),
    ],
)
def test_wrong_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.main(["doctor", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("distmoe doctor comm: error: ")
    assert words in output.err
    assert len(output.err.splitlines()) == 1


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "comm", "--help"]) == 0
    assert "--ranks-per-node G" in capsys.readouterr().out
