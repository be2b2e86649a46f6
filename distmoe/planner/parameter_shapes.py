"""The shapes of a model's parameters on one rank of the ep axis, by the unit that owns them.

A unit is what FSDP gathers at one time: the dense part of a block, the experts of a block, and the
root. Embedding, last norm and head count as the root here; fsdp2 gathers each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from distmoe.config import Config
from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.model.attention import attention_sizes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelUnits:
    """Parameters of each kind of unit, and how many blocks there are of each kind. ``experts`` are
    those of one rank of the ep axis, [e, G, H] and [e, H, I]; empty without MoE blocks.

    ``plain``: how many of the dense parameters are not decayed, norms, biases and embedding, in
    elements.
    """

    root: tuple[Shape, ...]
    dense_block: tuple[Shape, ...]
    moe_block: tuple[Shape, ...]
    experts: tuple[Shape, ...]
    num_dense: int
    num_moe: int
    plain: int

    @property
    def dense_elements(self) -> int:
        """Of everything but the experts."""
        return (
            elements(self.root)
            + self.num_dense * elements(self.dense_block)
            + self.num_moe * elements(self.moe_block)
        )

    @property
    def expert_elements(self) -> int:
        """Of the experts of one rank of the ep axis, over all blocks."""
        return self.num_moe * elements(self.experts)


def elements(shapes: tuple[Shape, ...]) -> int:
    return sum(map(prod, shapes))


def model_units(config: Config) -> ModelUnits:
    """Of a resolved config."""
    model, moe = config.model, config.moe
    H, V = model.hidden_size, model.vocab_size
    attention = attention_sizes(model).shapes
    norms: tuple[Shape, ...] = ((H,), (H,))
    head: tuple[Shape, ...] = () if model.tie_embeddings else ((V, H),)
    num_moe = model.n_layers - model.n_dense_layers
    shared = _swiglu(H, moe.shared_intermediate_size) if moe.shared_intermediate_size else ()
    width = activation_called(moe.activation).width(moe.intermediate_size)
    num_local = moe.num_experts // config.parallel.ep
    experts: tuple[Shape, ...] = (
        (num_local, width, H),
        (num_local, H, moe.intermediate_size),
    )
    in_vectors = sum(prod(shape) for shape in attention if len(shape) == 1) + 2 * H
    return ModelUnits(
        root=((V, H), (H,), *head),
        dense_block=(*attention, *norms, *_swiglu(H, model.intermediate_size)),
        moe_block=(*attention, *norms, (moe.num_experts, H), *shared),
        experts=experts if num_moe else (),
        num_dense=model.n_dense_layers,
        num_moe=num_moe,
        plain=V * H + H + model.n_layers * in_vectors,
    )


def _swiglu(hidden: int, width: int) -> tuple[Shape, ...]:
    return ((2 * width, hidden), (hidden, width))
