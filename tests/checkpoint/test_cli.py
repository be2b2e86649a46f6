"""`distmoe checkpoint`: what people and programs read, and exit codes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from distmoe.checkpoint.cli import main
from distmoe.checkpoint.consolidate import consolidate
from distmoe.checkpoint.store import CheckpointStore
from distmoe.checkpoint.tensors import saved_tensors
from distmoe.config import Config, ModelConfig, MoEConfig, ParallelConfig, TrainConfig, to_toml

Captured = pytest.CaptureFixture[str]

WEIGHTS = {
    "blocks.0.w": torch.arange(12.0).reshape(3, 4),
    "blocks.1.w": torch.arange(20.0).reshape(4, 5),
    "blocks.1.bias_E": torch.arange(4, dtype=torch.int32),
}
MOMENT = torch.arange(12.0).reshape(3, 4) / 8


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two ranks with the checkpoints of steps 4 and 8."""
    config = Config(
        model=ModelConfig(vocab_size=50, hidden_size=32, n_heads=2, n_kv_heads=1, head_dim=16),
        moe=MoEConfig(hidden_size=32, intermediate_size=16, num_experts=8, top_k=2),
        parallel=ParallelConfig(engine="fsdp2", dp_shard=2, ep=2, ranks_per_node=2),
        train=TrainConfig(global_batch_size=8, micro_batch_size=4),
    )
    rounding = replace(config.moe.rounding, rule="none")
    config = replace(config, moe=replace(config.moe, rounding=rounding))
    store = CheckpointStore(
        tmp_path / "run" / "checkpoints",
        group=None,
        keep_last=2,
        asynchronous=False,
        about={"world": 2, "engine": "fsdp2", "ep": 2, "config": to_toml(config)},
    )
    for step in (4, 8):
        store.save(
            step,
            {
                "model": WEIGHTS,
                "optimizer": {"blocks.0.w": {"exp_avg": MOMENT}},
                "progress": {"done": step},
            },
        )
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000008"


def test_inspect_shows_the_newest(run: Path, capsys: Captured) -> None:
    assert main(["inspect", str(run)]) == 0
    output = capsys.readouterr().out
    assert str(newest(run)) in output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    assert ["world", "2"] in rows
    assert ["step", "8"] in rows
    assert ["model", "3", "36", "0.0"] in rows
    assert ["model.blocks.1.w", "4 x 5", "float32", "0.00", "1"] in rows
    assert "exp_avg" not in output
    assert main(["inspect", "--all", str(run)]) == 0
    assert "optimizer.blocks.0.w.exp_avg" in capsys.readouterr().out


def test_inspect_for_programs(run: Path, capsys: Captured) -> None:
    assert main(["inspect", "--json", str(run / "checkpoints" / "step-00000004")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["step"], report["about"]["ep"]) == (4, 2)
    assert {t["name"]: t["bytes"] for t in report["tensors"]}["model.blocks.1.bias_E"] == 16
    assert main(["inspect", "--config", str(run)]) == 0
    assert tomllib.loads(capsys.readouterr().out)["moe"]["num_experts"] == 8


def test_verify_looks_at_all(run: Path, capsys: Captured) -> None:
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("as it was written") == 2
    (newest(run) / "__0_0.distcp").unlink()
    assert main(["verify", str(run)]) == 1
    output = capsys.readouterr().out
    assert "step-00000008: __0_0.distcp is missing" in output
    assert "step-00000004: as it was written" in output
    assert main(["verify", "--json", str(newest(run))]) == 1
    assert json.loads(capsys.readouterr().out) == {str(newest(run)): ["__0_0.distcp is missing"]}


@pytest.mark.parametrize(
    ("world", "fits"), [("2", [1, 2]), ("4", [1, 2, 4]), ("8", [1, 2, 4, 8]), ("3", [])]
)
def test_reshard_says_what_fits(
    run: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    world: str,
    fits: list[int],
) -> None:
    # The tokens need not be here.
    monkeypatch.setattr(import_module("distmoe.config.check"), "data_problems", lambda _: iter(()))
    assert main(["reshard", str(run), "--world", world]) == (0 if fits else 1)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1]) for line in lines if line.endswith("fits")] == fits
    if not fits:
        assert "train.global_batch_size is 8; it must be a multiple of" in lines[1]


def test_wrong_arguments_end_with_2_and_one_line(run: Path, capsys: Captured) -> None:
    for arguments, words in (
        (["verify", "no/run"], "there is no such folder"),
        (["verify", str(run.parent)], "it must be a checkpoint or a run that has one"),
        (["consolidate", str(run)], "--out"),
        (["reshard", str(run), "--world", "none"], "'none' must be an integer, at least 1"),
        (["consolidate", str(run), "--out", "x", "--max-gib", "0"], "must be a number above 0"),
        (["look", str(run)], "invalid choice: 'look'"),
    ):
        assert main(arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


def test_a_damaged_checkpoint_is_not_exported(run: Path, capsys: Captured) -> None:
    (newest(run) / ".metadata").write_bytes(b"")
    assert main(["consolidate", str(run), "--out", str(run / "out")]) == 1
    assert ".metadata has 0 bytes instead of" in capsys.readouterr().err
    assert not (run / "out").exists()


Written = list[tuple[str, dict[str, torch.Tensor]]]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """What is written, file by file, also where safetensors is not installed."""
    files: Written = []

    def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.touch()
        assert metadata == {"format": "pt", "step": "8"}
        files.append((path.name, tensors))

    monkeypatch.setattr("distmoe.checkpoint.consolidate._save_file", lambda: save_file)
    return files


def test_consolidate_holds_one_file_at_a_time(run: Path, written: Written) -> None:
    out = run / "out"
    consolidate(newest(run), out, max_bytes=64)
    assert [(file, sorted(tensors)) for file, tensors in written] == [
        ("model-00001-of-00002.safetensors", ["blocks.0.w", "blocks.1.bias_E"]),
        ("model-00002-of-00002.safetensors", ["blocks.1.w"]),
    ]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in written for name in tensors}
    assert index["metadata"] == {"total_size": 4 * (12 + 4 + 20)}
    for _, tensors in written:
        assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="out exists; name a new folder"):
        consolidate(newest(run), out)


def test_consolidate_with_moments(run: Path, written: Written) -> None:
    out = run / "out"
    assert main(["consolidate", str(run), "--out", str(out), "--optimizer"]) == 0
    ((file, tensors),) = written
    assert sorted(tensors) == sorted([*WEIGHTS, "optimizer.blocks.0.w.exp_avg"])
    assert torch.equal(tensors["optimizer.blocks.0.w.exp_avg"], MOMENT)
    assert sorted(path.name for path in out.iterdir()) == ["config.toml", file]


def test_other_programs_read_the_files(run: Path) -> None:
    load_file: Callable[[Path], dict[str, torch.Tensor]] = pytest.importorskip(
        "safetensors.torch"
    ).load_file
    consolidate(newest(run), run / "out")
    tensors = load_file(run / "out" / "model.safetensors")
    assert sorted(tensors) == sorted(WEIGHTS)
    assert all(torch.equal(tensors[name], weight) for name, weight in WEIGHTS.items())


def test_saved_tensors_have_logical_shapes(run: Path) -> None:
    found = {t.name: (t.shape, t.dtype, t.bytes) for t in saved_tensors(newest(run), "model")}
    assert found["model.blocks.1.w"] == ((4, 5), torch.float32, 80)
    assert len(found) == len(WEIGHTS)
