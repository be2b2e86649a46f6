"""One transformer block: attention, then a dense MLP or experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distmoe.comm.context import SequenceGather
from distmoe.comm.node_links import NodeGroups
from distmoe.config import Config
from distmoe.model.attention import make_attention
from distmoe.model.causal_attention import AttentionMask
from distmoe.model.norm import RMSNorm
from distmoe.moe.layer import MoE, MoELosses
from distmoe.moe.mlp import SwiGluMlp
from distmoe.moe.routing_tape import RoutingTape
from distmoe.named_range import named_range


class Block(nn.Module):
    """Pre-norm residual block; ``losses`` of the forward are None for a dense MLP."""

    def __init__(
        self,
        config: Config,
        *,
        layer: int,
        ep_group: dist.ProcessGroup | None,
        cp_group: dist.ProcessGroup | None,
        loss_group: dist.ProcessGroup | None,
        node_groups: NodeGroups | None,
    ) -> None:
        super().__init__()
        model = config.model
        self.name = f"layer {layer}"
        self.attention_norm = RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.gather = SequenceGather(
            cp_group,
            ranks_per_node=config.parallel.ranks_per_node,
            # In traces attention is no part of the MoE layer's passes.
            layer=f"{self.name}: attention",
        )
        self.attention = make_attention(model, self.gather)
        self.mlp_norm = RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.mlp: MoE | SwiGluMlp
        if layer < model.n_dense_layers:
            self.mlp = SwiGluMlp(model.hidden_size, model.intermediate_size)
        else:
            self.mlp = MoE(
                config.moe,
                ep_group,
                cp_group=cp_group,
                loss_group=loss_group,
                ranks_per_node=config.parallel.ranks_per_node,
                node_groups=node_groups,
                name=self.name,
            )
        self.recompute = config.train.activation_checkpoint

    def forward(
        self, x_BSH: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask
    ) -> tuple[Tensor, MoELosses | None]:
        with named_range("block", layer=self.name):
            if self.recompute == "full" and self.training:
                out: tuple[Tensor, MoELosses | None] = _checkpoint(
                    self._forward, x_BSH, cos, sin, mask
                )
                return out
            return self._forward(x_BSH, cos, sin, mask)

    def _forward(
        self, x_BSH: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask
    ) -> tuple[Tensor, MoELosses | None]:
        x_BSH = self._part("attention", self.attend, x_BSH, cos, sin, mask)
        if isinstance(self.mlp, SwiGluMlp):
            return self._part("dense MLP", self.dense, x_BSH), None
        mlp_BSH, losses = self.mlp(self.mlp_norm(x_BSH))
        return x_BSH + mlp_BSH, losses

    def _part(self, name: str, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``function`` under its name in profiles; computed again in the backward, if so set."""

        def named(*inputs: Any) -> Tensor:
            with named_range(name, layer=self.name):
                return function(*inputs)

        if self.recompute != "selective" or not self.training:
            return named(*inputs)
        out: Tensor = _checkpoint(named, *inputs)
        return out

    def attend(self, x_BSH: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask) -> Tensor:
        """The first half of the block."""
        out_BSH: Tensor = x_BSH + self.attention(self.attention_norm(x_BSH), cos, sin, mask)
        return out_BSH

    def dense(self, x_BSH: Tensor) -> Tensor:
        """The second half of a block without experts."""
        out_BSH: Tensor = x_BSH + self.mlp(self.mlp_norm(x_BSH))
        return out_BSH


def _checkpoint(function: Any, *inputs: Any) -> Any:
    """Recompute ``function`` in the backward; routing decisions are replayed, not made again."""
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        context_fn=RoutingTape.contexts,
        # Nothing in a block is drawn at random.
        preserve_rng_state=False,
    )
