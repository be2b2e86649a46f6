"""Profiles and memory snapshots of runs as they come: complete, stopped, resumed, failed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from distmoe.config import Config, ConfigError, RankInfo, RunConfig, TrainConfig
from distmoe.named_range import is_profiling, named_range
from distmoe.runtime import Runtime
from distmoe.train.memory_snapshots import PACKAGE
from distmoe.train.operator_table import operator_costs, range_costs, table, together
from distmoe.train.profiling import Profiling

CPU = torch.device("cpu")


def profiling(
    folder: Path, *, device: torch.device = CPU, rank: int = 0, **train: str
) -> Profiling:
    config = Config(run=RunConfig(dir=str(folder)), train=TrainConfig(**train))
    return Profiling(config, Runtime(RankInfo(rank=rank, world=4), device, None))


def work() -> None:
    x = torch.ones(8, 8, requires_grad=True)
    with named_range("product", layer="layer 3"):
        y = checkpoint(lambda x: (x @ x).relu(), x, use_reentrant=False)
    y.sum().backward()


def run(profiles: Profiling, steps: range) -> list[list[str]]:
    """What was told after every step."""
    told = []
    for step in steps:
        with profiles.step(step):
            work()
        told.append(profiles.end(step))
    return told


def names(path: Path) -> list[str]:
    return [event["name"] for event in json.loads(gzip.open(path).read())["traceEvents"]]


@pytest.fixture(autouse=True)
def _no_profiler_is_left() -> Iterator[None]:
    yield
    assert not is_profiling()


def test_a_complete_profile(tmp_path: Path) -> None:
    profiles = profiling(tmp_path, profile="2-3")
    told = run(profiles, range(1, 6))
    assert [bool(lines) for lines in told] == [False, False, True, False, False]
    assert told[2][0] == f"profiles up to step 3: {tmp_path}/profile, of ranks 0"
    assert any("aten::mm" in line for line in told[2])
    found = names(tmp_path / "profile" / "steps-2-3-rank-0.pt.trace.json.gz")
    assert {name for name in found if name.startswith("ProfilerStep#")} == {
        "ProfilerStep#2",
        "ProfilerStep#3",
    }
    assert found.count("layer 3: product") == 2
    assert profiles.finish(5) == []
    text = (tmp_path / "profile" / "steps-2-3-rank-0.operators.txt").read_text()
    assert "Self CPU Mem" in text
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {
        "steps-2-3-rank-0.pt.trace.json.gz",
        "steps-2-3-rank-0.operators.txt",
    }


@pytest.mark.parametrize(("steps", "file"), [(range(1, 4), "2-3"), (range(3, 5), "3-4")])
def test_a_run_that_stops_or_begins_within(tmp_path: Path, steps: range, file: str) -> None:
    profiles = profiling(tmp_path, profile="2-5")
    assert run(profiles, steps) == [[]] * len(steps)
    assert profiles.finish(steps[-1])
    profiles.close()
    assert "layer 3: product" in names(
        tmp_path / "profile" / f"steps-{file}-rank-0.pt.trace.json.gz"
    )


def test_a_run_that_ends_in_the_warm_up_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiles = profiling(tmp_path, profile="2-5")
    run(profiles, range(1, 2))
    assert profiles.finish(1) == []
    profiles.close()
    assert not (tmp_path / "profile").exists()
    assert capsys.readouterr().err == ""


def test_a_run_that_fails_says_that_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiles = profiling(tmp_path, profile="2-5")
    run(profiles, range(1, 3))
    profiles.close()
    profiles.close()
    assert capsys.readouterr().err == "rank 0: the profile that began at step 2 was not written\n"


def test_other_ranks_record_nothing(tmp_path: Path) -> None:
    profiles = profiling(tmp_path, profile="1", profile_ranks="0,3", rank=1)
    with profiles.step(1):
        assert not is_profiling()
    assert profiles.end(1) == [f"profiles up to step 1: {tmp_path}/profile, of ranks 0, 3"]
    assert not (tmp_path / "profile").exists()


def test_a_full_disk_costs_the_profile_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("in the way")
    run(profiling(tmp_path, profile="1"), range(1, 3))
    assert "rank 0: a profile up to step 1 is not written: " in capsys.readouterr().err


def test_a_name_costs_nothing_while_nobody_profiles() -> None:
    assert named_range("one") is named_range("another", layer="layer 1")


def test_tables() -> None:
    with torch.profiler.profile() as profile, named_range("ProfilerStep#1"):
        for layer in range(2):
            with named_range("attention", layer=f"layer {layer}"):
                torch.ones(64, 64) @ torch.ones(64, 64)
    events = profile.key_averages()
    operators, ranges = operator_costs(events), range_costs(events)
    assert [cost.host_ms for cost in operators] == sorted(
        (cost.host_ms for cost in operators), reverse=True
    )
    assert {cost.name: cost.calls for cost in operators}["aten::mm"] == 2
    assert not any("attention" in cost.name for cost in operators)
    assert [(cost.name, cost.calls) for cost in ranges] == [("ProfilerStep*", 1), ("attention", 2)]
    whole = together(operators)
    title, heading, first, *others = table("operators", operators, whole=whole, most=3)
    assert (title, heading.split()) == ("operators", ["host", "ms", "share", "calls"])
    assert first.startswith(operators[0].name)
    assert len(others) == 2
    shares = [100 * cost.host_ms / whole.host_ms for cost in operators]
    assert sum(shares) == pytest.approx(100)
    assert f"{shares[0]:.1f}%" in first


# What follows stands in for a GPU: the calls of torch.cuda.memory are recorded, not made.


@pytest.fixture
def cuda_memory(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls, in order."""
    calls: list[Any] = []
    module = torch.cuda.memory

    def dump(path: str) -> None:
        calls.append("dump")
        Path(path).write_bytes(b"snapshot")

    def block(size: int, *frames: tuple[str, int, str], state: str = "active_allocated") -> Any:
        named = [{"filename": f, "line": line, "name": name} for f, line, name in frames]
        return {"size": size << 20, "state": state, "frames": named}

    experts = (
        ("/srv/distmoe/.venv/torch/a.py", 1, "empty"),
        (f"{PACKAGE}moe/ep_function.py", 80, "forward"),
    )
    blocks = [
        block(512, *experts),
        block(512, *experts),
        block(256),
        block(9999, state="inactive"),
    ]
    monkeypatch.setattr(module, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(module, "_dump_snapshot", dump)
    monkeypatch.setattr(module, "_snapshot", lambda: {"segments": [{"blocks": blocks}]})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 5 << 30))
    return calls


CUDA = torch.device("cuda")


def test_a_memory_snapshot(tmp_path: Path, cuda_memory: list[Any]) -> None:
    told = run(profiling(tmp_path, device=CUDA, memory_snapshot="2-3"), range(1, 5))
    path = tmp_path / "profile" / "memory-steps-2-3-rank-0.pickle"
    assert told[2][1:] == [f"memory snapshot: {path}"]
    assert path.read_bytes() == b"snapshot"
    assert cuda_memory == [{"max_entries": 1_000_000}, "dump", {"enabled": None}]


@pytest.mark.parametrize("recorded", [False, True])
def test_a_full_memory_is_explained(
    tmp_path: Path,
    cuda_memory: list[Any],
    recorded: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    profiles = profiling(tmp_path, device=CUDA, memory_snapshot="7-9" if recorded else "")
    with pytest.raises(RuntimeError) as caught, profiles.step(7):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    profiles.close()
    path = tmp_path / "profile" / "out-of-memory-step-7-rank-0.pickle"
    hint = "" if recorded else " (train.memory_snapshot would name the code)"
    assert str(caught.value) == (
        "out of memory in step 7: 3.00 GiB in tensors, 4.00 held by the allocator, 5.00 on the "
        "device; biggest: 1.00 GiB by forward (moe/ep_function.py:80), 0.25 GiB in blocks of "
        f"256.0 MiB; memory snapshot: {path}{hint}; CUDA out of memory. Tried to allocate 2 GiB"
    )
    assert path.exists()
    assert capsys.readouterr().err == ""


def test_a_memory_without_history_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train.memory_snapshot is 2-3; it must be empty on the"):
        profiling(tmp_path, memory_snapshot="2-3")
