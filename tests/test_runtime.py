"""Which device a rank gets."""

from __future__ import annotations

import pytest
import torch

from distmoe.config import ConfigError
from distmoe.runtime import pick_device


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_fewer_gpus_than_ranks(name: str) -> None:
    assert pick_device(name, 0, local_world=1) == torch.device("cuda", 0)
    words = f"run.device is '{name}'; 2 ranks of a machine need a GPU each, and 1 can be seen"
    with pytest.raises(ConfigError, match=words):
        pick_device(name, 0, local_world=2)


@pytest.mark.usefixtures("one_gpu")
def test_ranks_on_a_cpu_need_no_gpu() -> None:
    assert pick_device("cpu", 1, local_world=2) == torch.device("cpu")


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", 1, local_world=2) == torch.device("cpu")
    with pytest.raises(ConfigError, match="run.device is 'cuda'; no CUDA device is here"):
        pick_device("cuda", 0)
