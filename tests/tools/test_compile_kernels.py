"""What the compiler of the bench's kernels refuses; what it compiles: kernels/test_launches.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import compile_kernels
import pytest
import torch
from compile_kernels import Compiled, main
from wrong_arguments import refusal

from distmoe.bench.kernels.shapes import Shape
from distmoe.kernels.moe_mlp.tiles import SPACE

WRONG = {
    "jobs": (["--jobs", "0"], "--jobs: '0' must be an integer, at least 1"),
    "shape": (["--shapes", "9B"], "unknown shape '9B'; known: 1.4B, 7B"),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(main, arguments, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no GPU to compile for" in refusal(main, [], capsys)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU for which nothing is compiled."""

    def compile_all(work: Sequence[tuple[Shape, int | None]], jobs: int) -> list[Compiled]:
        return [Compiled(shape.name, tiling, 9, 1.5) for shape, tiling in work]

    monkeypatch.setattr(compile_kernels, "compile_all", compile_all)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


def test_report(
    gpu: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "compiled.json"
    assert main(["--shapes", "TR", "--all-tiles", "--jobs", "2", "--json", str(path)]) == 0
    facts = json.loads(path.read_text())
    assert {key: facts[key] for key in ("device", "jobs")} == {"device": "NVIDIA H200", "jobs": 2}
    compiled = [(one["shape"], one["tiling"], one["launches"]) for one in facts["compiled"]]
    assert compiled == [("TR", tiling, 9) for tiling in range(SPACE.most_candidates)]
    assert main(["--shapes", "TR"]) == 0
    assert "9 launches of 1 shapes and tilings" in capsys.readouterr().out


def test_a_gpu_without_tma_has_its_defaults_only(
    gpu: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert main(["--shapes", "TR"]) == 0
    assert "9 launches" in capsys.readouterr().out
    words = "--all-tiles: the candidates are for NVIDIA GPUs of compute capability 9.0 and newer"
    assert words in refusal(main, ["--all-tiles"], capsys)
