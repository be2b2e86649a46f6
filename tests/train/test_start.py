"""What ranks must have alike before they train: tables of tile configurations among it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from tile_tables import table_file

from distmoe.config import Config, ConfigError, DataConfig, DispatchConfig, MoEConfig, RankInfo
from distmoe.config.dtype import with_dtype
from distmoe.launch.ports import free_port
from distmoe.runtime import Runtime, start
from distmoe.train.record_routing import RoutingRecorder
from distmoe.train.start import common_facts
from distmoe.train.start_facts import StartFacts

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "manifest.json").write_text("{}")
    return tmp_path


def run_with(data: Path, tiles: Path | str, kernel: str = "triton") -> Config:
    moe = MoEConfig(hidden_size=64, kernel=kernel, kernel_tiles=str(tiles))
    return Config(moe=moe, data=DataConfig(path=str(data)))


def problems_of_ranks(configs: Sequence[Config]) -> list[list[str]]:
    """What every rank is told when they start together, each with its own config."""
    port = free_port()
    told: list[list[str]] = []

    def come(rank: int) -> None:
        ranks = RankInfo(rank, len(configs), rank, len(configs), "127.0.0.1", port, "local")
        facts = partial(common_facts, configs[rank])
        try:
            start(ranks, device="cpu", timeout_s=5, threads=0, engine="fsdp2", facts=facts)
        except ConfigError as error:
            told.append(error.problems)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(len(configs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


@pytest.mark.parametrize("kernel", ["triton", "gluon"])
def test_kernels_of_gpus_are_refused_on_a_cpu(
    data: Path, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match=f"moe.kernel is '{kernel}'; on a CPU it must be auto"):
        common_facts(run_with(data, "auto", kernel), CPU)


def test_two_ranks_with_different_tables_are_refused(data: Path, tmp_path: Path) -> None:
    one, other = (table_file(tmp_path / f"{m}.toml", m=m) for m in (16, 32))
    told = problems_of_ranks([run_with(data, one), run_with(data, other)])
    assert len(told) == 2
    assert told[0] == told[1]
    (problem,) = told[0]
    assert problem.startswith("the table of moe.kernel_tiles is ")
    assert "... of cpu on rank 0 and " in problem
    assert problem.endswith("... of cpu on rank 1; it must be the same on all ranks")


def test_all_ranks_hear_that_one_has_a_table_of_another_device(data: Path, tmp_path: Path) -> None:
    right = table_file(tmp_path / "right.toml")
    wrong = table_file(tmp_path / "wrong.toml", device="NVIDIA H100")
    told = problems_of_ranks([run_with(data, right), run_with(data, wrong)])
    expected = f"device is 'NVIDIA H100' in '{wrong}'; it must be this device, 'cpu' (rank 1)"
    assert told == [[f"moe.kernel_tiles: {expected}"]] * 2


def test_the_same_table_may_lie_elsewhere(data: Path, tmp_path: Path) -> None:
    here, there = (table_file(tmp_path / name) for name in ("here.toml", "there.toml"))
    facts = common_facts(run_with(data, here), CPU)
    assert common_facts(run_with(data, there), CPU) == facts
    defaults = common_facts(run_with(data, "default"), CPU)
    assert defaults["the table of moe.kernel_tiles"] == "defaults"
    # Matrix products have no tiles.
    assert common_facts(run_with(data, here, kernel="torch"), CPU).items() >= {
        ("the table of moe.kernel_tiles", "defaults")
    }


def header(config: Config) -> dict[str, str]:
    """What a run says when it starts."""
    config, runtime = with_dtype(config, CPU.type), Runtime(RankInfo(), CPU, None)
    data: Any = SimpleNamespace(describe=str)
    facts = StartFacts(config, runtime, [], None, data, "")
    return dict(facts.rows(RoutingRecorder(config, RankInfo(), [])))


def test_a_run_says_in_what_form_rows_travel(data: Path) -> None:
    config = run_with(data, "default")
    assert header(config)["rows travel as"] == "fp32, partial sums fp32"
    dispatch = DispatchConfig(row_dtype="fp8", sum_dtype="bf16")
    config = replace(config, moe=replace(config.moe, dispatch=dispatch))
    assert header(config)["rows travel as"] == "fp8, partial sums bf16"


def test_a_run_says_which_tiles_it_takes(data: Path, tmp_path: Path) -> None:
    table = table_file(tmp_path / "tiles.toml")
    # The entry is of float16.
    assert header(run_with(data, table))["tiles"] == (
        "defaults: tuned for cpu (1 entry), but not for H64 I128 e16 gated float32"
    )
    assert header(run_with(data, "default"))["tiles"] == "defaults"
    assert "tiles" not in header(run_with(data, table, kernel="torch"))
