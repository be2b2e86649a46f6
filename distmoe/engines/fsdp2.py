"""FSDP-2: dense parameters sharded over dp_shard, experts over (efsdp, ep)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from distmoe.config import Config
from distmoe.engines import StepResult, compute_dtype, meta_model
from distmoe.engines.grad_norm import clip, grad_norm
from distmoe.engines.optimizer import make_optimizer, set_lr
from distmoe.engines.optimizer_state import load_optimizer_state, optimizer_state
from distmoe.mesh import Mesh
from distmoe.model.init import initialize
from distmoe.moe.experts import Experts


class Fsdp2Engine:
    """``fully_shard`` per block; the experts of a block are a unit of their own on their own axes.
    So are embedding and head, unless they are one: what is left, the root, stays gathered until the
    backward ends, and is reduced last.

    Expert parameters are DTensors over (efsdp, ep) whose logical shape has all E experts, so a
    checkpoint does not depend on ep.
    """

    def __init__(self, config: Config, mesh: Mesh | None, device: torch.device) -> None:
        if mesh is None:
            raise AssertionError("the fsdp2 engine needs a mesh; start the process group first")
        self.config, self.mesh = config, mesh
        self.model = meta_model(config, device, mesh)
        self._shard(compute_dtype(config))
        self.model.to_empty(device=device)
        self.model.tie()
        num_local = config.moe.num_experts // config.parallel.ep
        initialize(self.model, seed=config.run.seed, first_expert=mesh.ep_rank * num_local)
        self.optimizer = make_optimizer(config, self.model, self.model.named_parameters())

    def _shard(self, dtype: torch.dtype) -> None:
        parallel = self.config.parallel
        # Inputs keep their dtype: the scores that enter the experts are fp32 on purpose.
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for module in self.model.modules():
            if isinstance(module, Experts):
                self._shard_experts(module, policy)
        for block in self.model.blocks:
            fully_shard(
                block,
                mesh=self.mesh.fsdp,
                mp_policy=policy,
                reshard_after_forward=parallel.reshard_after_forward,
            )
        if not self.config.model.tie_embeddings:
            self._shard_edges(policy)
        self._root = fully_shard(self.model, mesh=self.mesh.fsdp, mp_policy=policy)
        if parallel.ep > 1:
            self._gather_ahead()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # Gradients are summed, never averaged; gloo has no scaled sum (PREMUL_SUM).
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def _shard_edges(self, policy: MixedPrecisionPolicy) -> None:
        """Embedding and head."""
        embedding = fully_shard(self.model.embedding, mesh=self.mesh.fsdp, mp_policy=policy)
        # The gradient of a look-up needs no weights.
        embedding.set_unshard_in_backward(False)
        # The head's backward comes next.
        head = self.model.head
        unit = fully_shard(head, mesh=self.mesh.fsdp, mp_policy=policy, reshard_after_forward=False)
        # In a forward FSDP keeps the buffer that a unit was gathered into until the next unit
        # comes. None comes after the head, and logits do; so it is waited for outside of FSDP's
        # own forward, after which the buffer is freed.
        head.register_forward_pre_hook(lambda *_: unit.unshard(), prepend=True)
        _sharded_units(self.model.blocks[-1])[0].set_modules_to_forward_prefetch([unit])

    def _gather_ahead(self) -> None:
        """Every block gathers the parameters of the next one, and those of its experts; so do the
        root, the embedding and the head.

        FSDP's own order issues a gather when the host comes to the module, which runs ahead of the
        device; but a layer whose experts are elsewhere makes the host wait for sizes.
        """
        model = self.model
        inner = [_sharded_units(part) for part in (model.embedding, *model.blocks, model.head)]
        # Tied, embedding and head are the root's.
        units = [part for part in inner if part]
        for before, after in pairwise([_sharded_units(model)[:1], *units]):
            before[0].set_modules_to_forward_prefetch(after)
        # Not the root: each router loss that it returns would have it gather the last block anew.
        for before, after in pairwise(units):
            after[0].set_modules_to_backward_prefetch([*after[1:], *before])

    def _shard_experts(self, experts: Experts, policy: MixedPrecisionPolicy) -> None:
        for name, parameter in list(experts.named_parameters(recurse=False)):
            shards = DTensor.from_local(
                parameter.data, self.mesh.sparse["ep"], [Shard(0)], run_check=False
            )
            experts.register_parameter(name, nn.Parameter(shards))
        # By expert where that divides; else by output row, which avoids empty shards.
        num_local = self.config.moe.num_experts // self.config.parallel.ep
        dim = 0 if num_local % self.mesh.efsdp_size == 0 else 1
        fully_shard(
            experts,
            mesh=self.mesh.expert_fsdp,
            mp_policy=policy,
            reshard_after_forward=self.config.parallel.reshard_after_forward,
            shard_placement_fn=lambda parameter: Shard(dim),
        )

    def backward(self, loss: Tensor, *, last: bool) -> None:
        parallel, root = self.config.parallel, self._root
        # What saves messages and costs memory is the user's choice. Replicas add up their own
        # shards until the last micro-batch: that costs none.
        root.set_requires_gradient_sync(last or parallel.reduce_gradients == "micro_batch")
        root.set_requires_all_reduce(last)
        root.set_reshard_after_backward(last or parallel.reshard_after_forward)
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> StepResult:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = grad_norm(gradients, self.mesh.dense_group)
        skipped = not bool(torch.isfinite(norm))
        if not skipped:
            clip(gradients, norm, self.config.optim.clip_norm)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(float(norm), skipped)

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def _free_gathered(self) -> None:
        """What a forward without a backward, as in validation, left gathered: checkpoints have the
        shards, and moments belong to these."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def state_dict(self) -> dict[str, Any]:
        self._free_gathered()
        named = dict(self.model.named_parameters())
        return {
            "model": {
                **{name: parameter.detach() for name, parameter in named.items()},
                **dict(self.model.named_buffers()),
            },
            "optimizer": optimizer_state(self.optimizer, named.items()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._free_gathered()
        with torch.no_grad():
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
                tensor.copy_(state["model"][name])
        load_optimizer_state(self.optimizer, self.model.named_parameters(), state["optimizer"])

    def close(self) -> None:
        """Nothing is held but the groups of the mesh."""


def _sharded_units(module: nn.Module) -> list[FSDPModule]:
    """The module itself, and then those in it, such as the experts of a block."""
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
