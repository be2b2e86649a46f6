"""Master weights and moments of a ZeRO optimizer as logical tensors, and back.

ZeRO keeps flat runs of elements that begin and end inside of parameters, which no DTensor can
describe. A checkpoint gets what the other engines give: dense parameters cut along dim 0 over all
ranks, experts over (efsdp, ep). One parameter at a time is whole on the way. The attributes read
here are private to DeepSpeed, as in `distmoe.engines.deepspeed_zero`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from distmoe.engines.adamw import MOMENTS
from distmoe.mesh import Mesh

# The flat fp32 partitions of this rank: of ZeRO 1 and 2, of ZeRO 1 in bf16, of ZeRO 3.
FLAT_MASTERS = (
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_partitioned_groups_flat",
)


class ZeroState:
    """The state of ``optimizer``, a ZeRO optimizer of DeepSpeed around AdamW, for the parameters of
    ``model``. ``experts``: names of those that this rank's ep group shares. Every method is
    collective."""

    def __init__(self, model: nn.Module, optimizer: Any, experts: set[str], mesh: Mesh) -> None:
        self.named = dict(model.named_parameters())
        self.optimizer, self.adamw = optimizer, optimizer.optimizer
        self.experts, self.mesh = experts, mesh
        self._states = self._made_states()

    def masters(self) -> dict[str, Tensor]:
        """name -> fp32 weights, sharded."""
        return {name: self._logical(name, None) for name in self.named}

    def moments(self) -> dict[str, dict[str, Any]]:
        """name -> {exp_avg, exp_avg_sq, step}; zeros before the first step."""
        step = float(self._states[0]["step"])
        return {
            name: {key: self._logical(name, key) for key in MOMENTS} | {"step": torch.tensor(step)}
            for name in self.named
        }

    def set_masters(self, values: Mapping[str, Tensor]) -> None:
        """Put back some of what `masters` gave, or plain tensors of this rank's whole parameters;
        the parameters of the model follow."""
        if not values:
            return
        partitioned = self._is_partitioned()
        if partitioned:
            self.optimizer.checkpoint_event_prologue()
        for name, parameter in self.named.items():
            self._write(parameter, _whole(values[name]), None)
        if partitioned:
            for i in range(len(self.optimizer.fp32_partitioned_groups_flat)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(i)
            self.optimizer.checkpoint_event_epilogue()
        else:
            self.optimizer.update_lp_params()

    def set_moments(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Put back what `moments` gave."""
        step = float(next(iter(values.values()))["step"])
        for state in self._states:
            state["step"] = torch.full_like(state["step"], step)
        for name, parameter in self.named.items():
            for key in MOMENTS:
                self._write(parameter, _whole(values[name][key]), key)

    def _is_partitioned(self) -> bool:
        """ZeRO 3: parameters are sharded, too."""
        return hasattr(self.optimizer, "fp32_partitioned_groups_flat")

    def _made_states(self) -> list[dict[str, Any]]:
        """AdamW's state of every flat partition, zeros. In their first step ZeRO 1 and 2 would link
        it to the parameters when only the first group has one."""
        found = [name for name in FLAT_MASTERS if hasattr(self.optimizer, name)]
        states = []
        for flat in getattr(self.optimizer, found[0]):
            state = self.adamw.state[flat]
            state["step"] = torch.zeros((), device=flat.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(flat, requires_grad=False)
            states.append(state)
        if not self._is_partitioned():
            self.optimizer._lazy_init_hp_params_optimizer_state()
        return states

    def _logical(self, name: str, key: str | None) -> DTensor:
        parameter: Any = self.named[name]
        if self._is_partitioned():
            whole = self.optimizer.get_full_hp_param(parameter, key)
        else:
            whole = parameter.get_full_hp_param(key)
        return self._sharded(whole.detach(), is_expert=name in self.experts)

    def _sharded(self, whole: Tensor, *, is_expert: bool) -> DTensor:
        """This rank's part of ``whole``, the parameter of all ranks, or of the experts here."""
        mesh = self.mesh.sparse["efsdp", "ep"] if is_expert else self.mesh.dense["dp_shard"]
        axis = mesh["efsdp"] if is_expert else mesh
        dim = 1 if is_expert else 0
        chunks, rank = whole.chunk(axis.size(), dim), axis.get_local_rank()
        own = chunks[rank] if rank < len(chunks) else whole.narrow(dim, 0, 0)
        experts = mesh["ep"].size() if is_expert else 1
        shape = torch.Size((whole.shape[0] * experts, *whole.shape[1:]))
        return DTensor.from_local(
            own.clone(),
            mesh,
            [Shard(1), Shard(0)] if is_expert else [Shard(0)],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    def _write(self, parameter: Any, whole: Tensor, key: str | None) -> None:
        if not self._is_partitioned():
            parameter.set_full_hp_param(whole, key)
            return
        # DeepSpeed's own setter for whole tensors fails on a last part that is shorter.
        size, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
        part = whole.flatten()[rank * size : (rank + 1) * size]
        part = F.pad(part, (0, size - part.numel()))
        self.optimizer.set_local_hp_param(part, parameter, key)


def _whole(value: Tensor) -> Tensor:
    """All of a dense parameter, or of the experts of this rank."""
    if not isinstance(value, DTensor):
        return value
    names = value.device_mesh.mesh_dim_names or ()
    placements = [
        placement if axis == "ep" else Replicate()
        for axis, placement in zip(names, value.placements, strict=True)
    ]
    return value.redistribute(placements=placements).to_local()
