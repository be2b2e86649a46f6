"""What a rank holds of a unit that FSDP shards, and what a gathered unit takes: elements.

`fully_shard` cuts every parameter by itself into chunks of ceil(size / ranks) along one dim and
pads the last ones, so a gathered unit is up to ranks - 1 rows per parameter larger than it was. A
norm of H elements over n > H ranks takes one element each.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from distmoe.config import Config
from distmoe.planner.parameter_shapes import ModelUnits, Shape, elements


@dataclass(frozen=True)
class ShardedUnit:
    """``shard``: elements on each rank, padding included. ``ranks``: over how many it is sharded.
    ``whole``: elements of the parameters themselves. ``largest``: elements of the largest shard of
    one parameter. ``by_rows``: experts that are cut inside, as their number does not divide."""

    shard: int
    ranks: int
    whole: int
    largest: int
    by_rows: bool = False

    @property
    def gathered(self) -> int:
        """Elements of the unit where it is gathered, padding included."""
        return self.shard * self.ranks


@dataclass(frozen=True)
class ShardedModel:
    """The units of a model under fsdp2. The root has the last norm, and embedding and head where
    these are one; else each is a unit of its own."""

    root: ShardedUnit
    embedding: ShardedUnit
    head: ShardedUnit
    dense_block: ShardedUnit
    moe_block: ShardedUnit
    experts: ShardedUnit

    def shard(self, units: ModelUnits) -> int:
        """Elements of the whole model on a rank."""
        per_moe_block = self.moe_block.shard + self.experts.shard
        return (
            self.root.shard
            + self.embedding.shard
            + self.head.shard
            + units.num_dense * self.dense_block.shard
            + units.num_moe * per_moe_block
        )


def sharded_model(config: Config, units: ModelUnits) -> ShardedModel:
    """Dense parameters over dp_shard; experts over efsdp, by expert where that divides, else by
    output row (`Fsdp2Engine`). Replicas (dp_replicate) hold the same."""
    shard, ep = config.parallel.dp_shard, config.parallel.ep
    efsdp = shard // ep
    by_rows = bool(config.moe.num_experts // ep % efsdp)
    embedding, norm, head = units.root[:1], units.root[1:2], units.root[2:]
    return ShardedModel(
        root=_unit(norm if head else embedding + norm, shard, dim=0),
        embedding=_unit(embedding if head else (), shard, dim=0),
        head=_unit(head, shard, dim=0),
        dense_block=_unit(units.dense_block, shard, dim=0),
        moe_block=_unit(units.moe_block, shard, dim=0),
        experts=_unit(units.experts, efsdp, dim=1 if by_rows else 0),
    )


def _unit(shapes: tuple[Shape, ...], ranks: int, *, dim: int) -> ShardedUnit:
    shards = [chunk_elements(shape, ranks, dim=dim) for shape in shapes]
    return ShardedUnit(
        shard=sum(shards),
        ranks=ranks,
        whole=elements(shapes),
        largest=max(shards, default=0),
        by_rows=dim == 1,
    )


def chunk_elements(shape: Shape, ranks: int, *, dim: int = 0) -> int:
    """Of the largest of ``ranks`` chunks of a tensor along ``dim``."""
    return prod(shape) // shape[dim] * -(-shape[dim] // ranks)
