"""DeepSpeed's ZeRO 1, 2 and 3: dense parameters over all ranks, experts over those that hold the
same ones.

DeepSpeed shards, reduces, clips and updates. The model, the token exchange, AdamW's groups and
checkpoints stay ours. It treats experts as such only where it finds a layer class of its own, so
the model carries a mark of that class, without parameters and without a forward; the experts'
parameters carry the attributes that go with it. Those names are private to DeepSpeed and change
with its versions: the extra pins one, and tests/engines/test_deepspeed_names.py holds them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmoe.comm.torch_group import limit_waits
from distmoe.config import Config
from distmoe.engines import StepResult, compute_dtype, meta_model
from distmoe.engines.adamw import decays
from distmoe.engines.deepspeed_json import deepspeed_json
from distmoe.engines.deepspeed_state import ZeroState
from distmoe.engines.optimizer import set_lr
from distmoe.mesh import Mesh
from distmoe.model.init import initialize
from distmoe.model.transformer import Transformer
from distmoe.moe.experts import Experts

# Importing it warns about a machine without GPUs.
logging.disable(logging.WARNING)
try:
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.utils import groups
    from deepspeed.utils.logging import set_log_level_from_string
except ImportError as error:
    raise ImportError(
        f"the engine 'deepspeed' needs the package deepspeed ({error}): "
        "pip install 'distmoe[deepspeed]'"
    ) from error
finally:
    logging.disable(logging.NOTSET)


class DeepSpeedZeroEngine:
    """One DeepSpeed engine around the model, driven by the gradient rule of `distmoe.engines`."""

    def __init__(self, config: Config, mesh: Mesh | None, device: torch.device) -> None:
        if mesh is None:
            raise AssertionError("the deepspeed engine needs a mesh; start the process group first")
        self.config, self.world = config, dist.get_world_size()
        dtype = compute_dtype(config)
        self.model = meta_model(config, device, mesh)
        self.model.to_empty(device=device)
        self.model.tie()
        num_local = config.moe.num_experts // config.parallel.ep
        initialize(self.model, seed=config.run.seed, first_expert=mesh.ep_rank * num_local)
        experts = mark_experts(
            self.model, num_experts=config.moe.num_experts, ep=config.parallel.ep
        )
        self.optimizer = build_optimizer(self.model, experts, config, device)
        # DeepSpeed would take its master weights from parameters that are rounded already.
        rounded = dtype != torch.float32
        masters = {n: p.detach().cpu().clone() for n, p in self.model.named_parameters() if rounded}
        _prepare(device)
        options = deepspeed_json(config, world=self.world, dtype=dtype)
        # One of its optimizers prints the memory in use.
        with contextlib.redirect_stdout(io.StringIO()):
            self.zero, *_ = deepspeed.initialize(
                model=self.model, optimizer=self.optimizer, config=options
            )
        _limit_waits(config.launch.timeout_s)
        self.state = ZeroState(self.model, self.zero.optimizer, experts, mesh)
        self.state.set_masters(masters)
        self.model.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, *_: Any) -> None:
        """The part of DeepSpeed's own forward that matters: its bookkeeping of backwards."""
        self.zero.optimizer.clear_backward_seen_flag()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.zero.set_gradient_accumulation_boundary(last)
        # DeepSpeed's forward would hook this to the outputs, if they were a tuple of tensors.
        self.zero._backward_prologue()
        # DeepSpeed divides by the ranks; gradients are to be sums. The second factor is 1, or NaN
        # for a loss that is not finite, so that DeepSpeed skips the step on all ranks.
        scale = self.world * (1 + 0 * loss.detach())
        self.zero.backward(loss * scale, scale_wrt_gas=False)

    def step(self, lr: float) -> StepResult:
        set_lr(self.optimizer, lr)
        self.zero.step()
        skipped = bool(self.zero.optimizer.overflow)
        norm = float("nan") if skipped else float(self.zero.get_global_grad_norm())
        return StepResult(norm, skipped)

    def discard(self) -> None:
        if not self.step(0.0).skipped:
            raise AssertionError("a loss that is not finite left finite gradients")

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": {**self.state.masters(), **dict(self.model.named_buffers())},
            "optimizer": self.state.moments(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state.set_moments(state["optimizer"])
        self.state.set_masters(state["model"])
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(state["model"][name])

    def close(self) -> None:
        self.zero.destroy()
        groups._release_process_group_references()


class ExpertsMark(AutoEPMoELayer):  # type: ignore[misc]
    """What DeepSpeed looks for in a model to see that it has experts, on ``ep`` ranks."""

    def __init__(self, num_experts: int, ep: int) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.ep = num_experts, ep

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """Make the groups of the experts: ranks with the same ones, and ranks with others."""
        if group_name(self.ep) not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep)


def group_name(ep: int) -> str:
    """DeepSpeed's name of the groups; it reads the number back from it."""
    return f"ep_size_{ep}"


def mark_experts(model: Transformer, *, num_experts: int, ep: int) -> set[str]:
    """Tell DeepSpeed which parameters are experts; their names."""
    names = set()
    for module_name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            for name, parameter in module.named_parameters():
                names.add(f"{module_name}.{name}")
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = group_name(ep)  # type: ignore[attr-defined]
                parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                parameter.ds_zero_partition_group_name = group_name(ep)  # type: ignore[attr-defined]
    if names:
        model.add_module("experts_mark", ExpertsMark(num_experts, ep))
    return names


def build_optimizer(
    model: Transformer, experts: set[str], config: Config, device: torch.device
) -> torch.optim.AdamW:
    """AdamW with the groups that DeepSpeed asks for: named, experts apart."""
    optim = config.optim
    named: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        dense = "decayed" if decays(name) else "plain"
        group = group_name(config.parallel.ep) if name in experts else dense
        named.setdefault(group, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "name": name,
                "params": parameters,
                "weight_decay": 0.0 if name == "plain" else optim.weight_decay,
                "moe": name not in ("decayed", "plain"),
            }
            for name, parameters in named.items()
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        # See `build_adamw`.
        fused=config.deepspeed.offload_optimizer != "none" or device.type == "cuda" or None,
    )


def _limit_waits(timeout_s: float) -> None:
    """Of DeepSpeed's groups, to which torch gives its own default."""
    for made in (
        [groups._get_data_parallel_group()],
        groups._get_expert_parallel_group_dict().values(),
        groups._get_expert_data_parallel_group_dict().values(),
    ):
        for group in made:
            limit_waits(group, timeout_s)


def _prepare(device: torch.device) -> None:
    """Settings of DeepSpeed that its JSON has no key for."""
    set_log_level_from_string("error")
    # It calls collectives by names that torch is about to retire, several times a step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu" and get_accelerator().device_name() != "cpu":
        set_accelerator(CPU_Accelerator())
    # Asked for it, DeepSpeed tries compilers, and builds a collective that nobody calls: a minute.
    deepspeed.ops.__compatible_ops__ = {}
