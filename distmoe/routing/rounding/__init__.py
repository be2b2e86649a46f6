"""Token rounding: every expert's token count, summed over the group, becomes a multiple of M.

A *rule* picks the targets n_E from the top-k counts f_E; a *selection* picks which pairs change.
See docs/design.md, "Token rounding".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from distmoe.comm import Exchange
from distmoe.routing.rounding.radix_select import KeyedPairs


@dataclass(frozen=True)
class Population:
    """Of every rank, int64: ``counts_PE`` pairs that top-k chose, ``tokens_P`` tokens, and
    ``room_PE`` the tokens that may take each expert, all of them unless routing is limited to
    groups of experts ([P, 1] then, to be broadcast)."""

    counts_PE: Tensor
    tokens_P: Tensor
    room_PE: Tensor

    @cached_property
    def freq_E(self) -> Tensor:
        """int64: f_E, top-k pairs per expert over all ranks."""
        return self.counts_PE.sum(0)

    def of_rank(self, rank: int) -> Population:
        """That rank alone."""
        own = slice(rank, rank + 1)
        return Population(self.counts_PE[own], self.tokens_P[own], self.room_PE[own])


# Collective, and called by the rules that need it only.
KeySums = Callable[[], tuple[Tensor, Tensor]]


def _no_key_sums() -> tuple[Tensor, Tensor]:
    raise ValueError("this rule weighs scores: it cannot be applied to counts alone")


class Targets(Protocol):
    """f_E -> n_E, int64, by integer arithmetic that is the same on every rank.

    ``tile``: M. ``room``: tokens that may take an expert, a number or int64 that broadcasts to
    [E]; no target exceeds it.
    ``groups``: equal runs of experts over which ``balance`` levels the tiles. ``seed``: of rules
    that draw. ``key_sums``: for rules that weigh what they move; see `border.key_sums`.
    """

    def __call__(
        self,
        freq_E: Tensor,
        *,
        tile: int,
        room: int | Tensor,
        groups: int,
        seed: int,
        key_sums: KeySums,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Rule:
    """``targets``, and ``most_added(num_experts, tile)``: a bound on sum(n_E) - sum(f_E) that
    needs no counts, from which buffers are sized without waiting for a device."""

    targets: Targets
    most_added: Callable[[int, int], int]

    def __call__(
        self,
        freq_E: Tensor,
        *,
        tile: int,
        room: int | Tensor,
        groups: int,
        seed: int = 0,
        key_sums: KeySums | None = None,
    ) -> Tensor:
        return self.targets(
            freq_E,
            tile=tile,
            room=room,
            groups=groups,
            seed=seed,
            key_sums=key_sums or _no_key_sums,
        )


@dataclass(frozen=True)
class Change:
    """``amount_E`` int64 pairs of each expert change over the group; ``adds_E`` bool: they are
    added, else dropped. ``best()``: int32 [E, M - 1], this rank's best candidates, see
    `RoundSelect.best`."""

    population: Population
    adds_E: Tensor
    amount_E: Tensor
    best: Callable[[], Tensor]


@dataclass(frozen=True)
class Amounts:
    """How many pairs change, int64. ``own_E``: this rank's, its best ones of each expert.
    ``here_Pe``: every rank's, of the experts that live on this rank; None where the ranks do not
    divide the experts."""

    own_E: Tensor
    here_Pe: Tensor | None

    @staticmethod
    def of_all(amount_PE: Tensor, exchange: Exchange) -> Amounts:
        """From the amounts of all ranks and experts."""
        return Amounts(amount_PE[exchange.rank], owned_part(amount_PE, exchange))


def owned_part(count_PE: Tensor, exchange: Exchange) -> Tensor | None:
    """[P, e]: the columns of the experts that live on this rank; None where the ranks do not
    divide the experts."""
    num_local, rest = divmod(count_PE.shape[1], exchange.size)
    if rest:
        return None
    return count_PE[:, exchange.rank * num_local : (exchange.rank + 1) * num_local]


class Within(Protocol):
    """How many pairs of each expert every rank changes, all together less than a tile.

    ``transport``: of selections that compare the candidates of all ranks; see `transports`.
    """

    def __call__(self, change: Change, *, exchange: Exchange, transport: str) -> Amounts: ...


@dataclass(frozen=True)
class Drops:
    """int64. This rank drops an expert's pairs below ``limit_E``, and of those at it the last
    ``ties_E``; ``amount_PE``: how many every rank drops."""

    limit_E: Tensor
    ties_E: Tensor
    amount_PE: Tensor


class Overflow(Protocol):
    """Which pairs every rank drops where experts have ``over_E`` (int64) pairs too many in the
    group, any number of tiles. ``pairs``: this rank's."""

    def __call__(
        self, pairs: KeyedPairs, population: Population, over_E: Tensor, *, exchange: Exchange
    ) -> Drops: ...


@dataclass(frozen=True)
class Selection:
    """Which pairs change: ``amounts`` for rounding, ``overflow`` for a capacity."""

    amounts: Within
    overflow: Overflow


def may_round_up(freq_E: Tensor, *, tile: int, room: int | Tensor) -> Tensor:
    """[E] bool: a tile is started, and there are tokens enough to fill it."""
    up_E = (freq_E // tile + 1) * tile
    return (freq_E % tile > 0) & (up_E <= room)
