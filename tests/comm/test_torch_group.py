"""Which backend carries rows."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from distmoe.comm.torch_group import row_backend


@pytest.mark.parametrize(
    ("config", "gpu", "backend"),
    [
        # As torchrun on GPUs has it: figures travel over gloo, rows do not.
        ("cpu:gloo,cuda:nccl", True, "nccl"),
        ("cpu:gloo,cuda:nccl", False, "gloo"),
        ("cpu:gloo,cuda:gloo", True, "gloo"),
        ("cuda:nccl", True, "nccl"),
        ("cpu:gloo", True, "gloo"),
    ],
)
def test_the_backend_of_the_device(
    config: str, gpu: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert row_backend(None) == backend
