"""What the compiler of the bench's kernels refuses; what it compiles: kernels/test_launches.py."""

from __future__ import annotations

import pytest
import torch
from compile_kernels import main
from wrong_arguments import refusal

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
