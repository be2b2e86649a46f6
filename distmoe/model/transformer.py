"""The decoder-only language model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor, nn

from distmoe.comm.context import WHOLE, ContextPart
from distmoe.config import Config
from distmoe.config.loss_chunks import loss_chunk_tokens
from distmoe.model.attention import attention_sizes
from distmoe.model.block import Block
from distmoe.model.causal_attention import document_mask
from distmoe.model.head import Head
from distmoe.model.norm import RMSNorm
from distmoe.model.rope import rope_tables
from distmoe.moe.layer import MoE, MoELosses
from distmoe.moe.layer_groups import node_groups_for
from distmoe.named_range import named_range


@dataclass(frozen=True)
class LossSums:
    """``token_loss``: cross entropy summed over this rank's valid tokens, in nats, fp32.

    ``layers``: the router losses of every MoE layer.
    """

    token_loss: Tensor
    layers: list[MoELosses] = field(default_factory=list)


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head. Build it under ``torch.device("meta")``.

    ``ep_group``: ranks that share the experts. ``cp_group``: ranks that share the sequences, of
    which each has a part. ``loss_group``: ranks over whose tokens the load-balance loss counts.
    """

    def __init__(
        self,
        config: Config,
        *,
        ep_group: dist.ProcessGroup | None = None,
        cp_group: dist.ProcessGroup | None = None,
        loss_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        model = config.model
        self.config = config
        self.rotary_dim = attention_sizes(model).rotary_dim
        self.part = WHOLE
        if cp_group is not None:
            self.part = ContextPart(dist.get_rank(cp_group), dist.get_world_size(cp_group))
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        # One set for all layers.
        node_groups = node_groups_for(
            config.moe,
            ep_group,
            config.parallel.ranks_per_node,
            timeout_s=config.launch.timeout_s,
        )
        self.blocks = nn.ModuleList(
            Block(
                config,
                layer=layer,
                ep_group=ep_group,
                cp_group=cp_group,
                loss_group=loss_group,
                node_groups=node_groups,
            )
            for layer in range(model.n_layers)
        )
        self.final_norm = RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.head = Head(model.hidden_size, model.vocab_size)
        self.tie()

    def tie(self) -> None:
        """Make the head share the embedding's weight, if so configured; again after `to_empty`."""
        if self.config.model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def moe_layers(self) -> list[MoE]:
        """The MoE layers, first to last."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        start_BS: Tensor | None = None,
    ) -> Tensor | LossSums:
        """Logits [B, S, V], or, with labels, the sums from which the loss is made; of this rank's
        part of the positions.

        ``start_BS``: where each position's document begins in its row, if attention is to end at
        the boundaries of documents.
        """
        x_BSH = self.embedding(tokens_BS)
        position_S = self.part.positions(tokens_BS.shape[1], x_BSH.device)
        cos, sin = rope_tables(position_S, self.rotary_dim, model=self.config.model)
        mask = document_mask(start_BS, self.part)
        layers = []
        for block in self.blocks:
            x_BSH, losses = block(x_BSH, cos, sin, mask)
            if losses is not None:
                layers.append(losses)
        x_BSH = self.final_norm(x_BSH)
        if labels_BS is None:
            logits_BSV: Tensor = self.head(x_BSH)
            return logits_BSV
        x_TH, label_T = x_BSH.flatten(0, 1), labels_BS.flatten()
        chunk = loss_chunk_tokens(self.config, len(x_TH))
        with named_range("loss"):
            token_loss = self.head(x_TH, label_T, chunk_tokens=chunk)
        return LossSums(token_loss, layers)
