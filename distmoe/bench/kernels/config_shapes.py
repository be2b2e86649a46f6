"""The layers that a rank of a run computes."""

from __future__ import annotations

from distmoe.bench.kernels.shapes import Shape
from distmoe.config import Config
from distmoe.config.batch import rank_tokens
from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.planner.row_volumes import groups_touched


def shapes_of_run(config: Config) -> list[Shape]:
    """Of a resolved config: e = E / P experts with the mean pairs of a rank, and, with P > 1, with
    those that one rank sends another, as a step of the exchange brings them.

    A row that arrives has K / D(P) pairs on average (`row_volumes`); here each has as many as that
    gives when rounded. ValueError for an activation that the bench does not compute.
    """
    moe, P = config.moe, config.parallel.ep
    if not activation_called(moe.activation).gated:
        raise ValueError(
            f"moe.activation is {moe.activation}; the bench has experts with a gate only"
        )
    pairs = rank_tokens(config) * moe.top_k
    touched = groups_touched(P, num_experts=moe.num_experts, top_k=moe.top_k)
    per_row = max(1, round(moe.top_k / touched))

    def shape(name: str, num_pairs: int) -> Shape:
        return Shape(
            name,
            T=max(1, num_pairs // per_row),
            H=moe.hidden_size,
            I=moe.intermediate_size,
            E=moe.num_experts // P,
            K=per_row,
            tile=moe.rounding.tile,
        )

    name = config.run.name
    whole = shape(name, pairs)
    return [whole] if P == 1 else [whole, shape(f"{name}-step", pairs // P)]
