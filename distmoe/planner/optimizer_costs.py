"""What Muon keeps and computes in place of AdamW, for the matrices that it has.

A momentum instead of two moments; then Newton-Schulz: five steps that turn a matrix [m, n], m <= n,
into its Gram matrix, the square of that, and both times the matrix: 2 m^2 n + 2 m^3 + 2 m^2 n.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from distmoe.config import Config
from distmoe.engines.newton_schulz import BATCH_ELEMENTS, STEPS
from distmoe.planner.parameter_shapes import ModelUnits, Shape
from distmoe.registry import GATED_ACTIVATIONS

FP32 = 4
# Memory traffic of an element. AdamW as a list of operators. Muon in bf16, momentum and weight in
# fp32: momentum 20, G + mu M 12, to bf16 6, the norm and the division by it 6, a step of
# Newton-Schulz 6, the result in place 4, its scale 4, decay 8, update 10.
ADAMW_BYTES, MUON_BYTES = 80, 20 + 12 + 6 + 6 + STEPS * 6 + 4 + 4 + 8 + 10


@dataclass(frozen=True)
class MuonUnits:
    """``units``: the weights that Muon updates (`distmoe.model.matrices`), none with AdamW. Their
    matrices, by block: ``dense`` and ``routed`` [m, n], ``experts`` [e, m, n] of a rank of the ep
    axis."""

    units: ModelUnits
    dense: tuple[Shape, ...] = ()
    routed: tuple[Shape, ...] = ()
    experts: tuple[Shape, ...] = ()

    @property
    def elements(self) -> int:
        """On a rank of the ep axis."""
        return self.units.dense_elements + self.units.expert_elements

    @property
    def dense_flops(self) -> int:
        """Of Newton-Schulz for all matrices but the experts'."""
        dense = self.units.num_dense * sum(map(_flops, self.dense))
        return dense + self.units.num_moe * sum(map(_flops, self.routed))

    @property
    def expert_flops(self) -> int:
        return self.units.num_moe * sum(map(_flops, self.experts))


def muon_units(config: Config, units: ModelUnits) -> MuonUnits:
    """Of the model that has ``units``."""
    model, moe = config.model, config.moe
    if config.optim.name != "muon":
        return MuonUnits(replace(units, root=(), dense_block=(), moe_block=(), experts=(), plain=0))
    dense, routed = _weights(units.dense_block), _weights(units.moe_block)
    routed.remove((moe.num_experts, model.hidden_size))
    experts = units.experts
    if experts and GATED_ACTIVATIONS[moe.activation]:
        (e, width, H), w_out = experts
        experts = (*[(e, width // 2, H)] * 2, w_out)
    return MuonUnits(
        replace(units, root=(), dense_block=tuple(dense), moe_block=tuple(routed), plain=0),
        _apart(dense, model.intermediate_size, model.hidden_size),
        _apart(routed, moe.shared_intermediate_size, model.hidden_size),
        experts,
    )


def _weights(shapes: tuple[Shape, ...]) -> list[Shape]:
    return [shape for shape in shapes if len(shape) == 2]


def _apart(weights: list[Shape], width: int, hidden: int) -> tuple[Shape, ...]:
    """The matrices in ``weights``, with gate and up apart."""
    if not width:
        return tuple(weights)
    rest = list(weights)
    rest.remove((2 * width, hidden))
    return (*rest, (width, hidden), (width, hidden))


def _flops(shape: Shape) -> int:
    *batch, rows, columns = shape
    m, n = sorted((rows, columns))
    return prod(batch) * STEPS * (4 * m * m * n + 2 * m**3)


def muon_buffers(*, whole: int, batch: int, cut: int, largest_cut: int, on_gpu: bool) -> int:
    """Bytes, the most that Muon's update makes at one time.

    ``whole``: elements of the largest weight whose matrices lie whole on the rank, ``batch`` of
    them orthogonalised at once. ``cut``: elements of the rank's rows of all other weights,
    ``largest_cut`` of the largest matrix among them. Newton-Schulz takes up to three copies of what
    it works on; rows that travel are there as they are, packed and received, and then whole.
    """
    itemsize = 2 if on_gpu else FP32
    cast = itemsize if on_gpu else 0
    own = max(FP32 * whole + cast * whole, itemsize * (whole + 3 * min(batch, BATCH_ELEMENTS)))
    owned = max(cut, largest_cut)
    return max(own, itemsize * (2 * cut + 2 * owned + 3 * min(owned, BATCH_ELEMENTS)))
