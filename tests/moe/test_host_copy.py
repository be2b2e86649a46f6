"""Copies that no host waits for."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distmoe.moe.host_copy import HostCopy, enqueued


class Batch:
    """Stands for host memory, and notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def pin_memory(self) -> Batch:
        self.asked.append("pin_memory")
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        self.asked.append((device.type, non_blocking))
        return self


def test_what_goes_to_a_gpu_is_page_locked_and_not_waited_for() -> None:
    batch: Any = Batch()
    enqueued(batch, torch.device("cuda", 3))
    assert batch.asked == ["pin_memory", ("cuda", True)]


def test_a_cpu_needs_no_copy() -> None:
    x = torch.arange(3)
    assert enqueued(x, torch.device("cpu")) is x


def test_the_host_s_copy_is_its_own_whatever_the_default_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", MagicMock())
    with FakeTensorMode(), torch.device("cuda"):
        assert HostCopy(torch.zeros(3, dtype=torch.int32))._host.device.type == "cpu"
