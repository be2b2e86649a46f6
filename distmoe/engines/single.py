"""One rank, nothing sharded: the reference of every other engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distmoe.config import Config
from distmoe.engines import StepResult, compute_dtype, meta_model
from distmoe.engines.grad_norm import clip, grad_norm
from distmoe.engines.optimizer import make_optimizer, set_lr
from distmoe.engines.optimizer_state import load_optimizer_state, optimizer_state
from distmoe.mesh import Mesh
from distmoe.model.init import initialize


class SingleEngine:
    """Plain autograd. With bf16 the model holds bf16 copies of fp32 master weights, and
    gradients are added up in fp32 as they appear."""

    def __init__(self, config: Config, mesh: Mesh | None, device: torch.device) -> None:
        self.config = config
        self.model = meta_model(config, device)
        self.model.to_empty(device=device)
        self.model.tie()
        initialize(self.model, seed=config.run.seed)
        self.master = {
            name: parameter.detach().clone() for name, parameter in self.model.named_parameters()
        }
        self.model.to(compute_dtype(config))
        for name, parameter in self.model.named_parameters():
            parameter.register_post_accumulate_grad_hook(self._collector(name))  # type: ignore[no-untyped-call]
        self.optimizer = make_optimizer(config, self.model, self.master.items())

    def _collector(self, name: str) -> Any:
        master = self.master[name]

        def collect(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                raise AssertionError(f"{name} has no gradient to collect")
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad.add_(gradient)
            parameter.grad = None

        return collect

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> StepResult:
        gradients = [m.grad for m in self.master.values() if m.grad is not None]
        norm = grad_norm(gradients, None)
        skipped = not bool(torch.isfinite(norm))
        if not skipped:
            clip(gradients, norm, self.config.optim.clip_norm)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            self._copy_master()
        self.optimizer.zero_grad()
        return StepResult(float(norm), skipped)

    @torch.no_grad()
    def _copy_master(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.master[name])

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": {**self.master, **dict(self.model.named_buffers())},
            "optimizer": optimizer_state(self.optimizer, self.master.items()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in (*self.master.items(), *self.model.named_buffers()):
                tensor.copy_(state["model"][name])
        load_optimizer_state(self.optimizer, self.master.items(), state["optimizer"])
        self._copy_master()

    def close(self) -> None:
        """Nothing is held but the groups of the mesh."""
