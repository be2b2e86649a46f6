"""Without a GPU, Gluon kernels run on three multiprocessors, so that programs walk tiles."""

from __future__ import annotations

import pytest
import torch

from distmoe.kernels.moe_mlp import gluon_backend


@pytest.fixture(autouse=not torch.cuda.is_available())
def _three_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_backend, "multiprocessors", lambda device: 3)
