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


@dataclass(frozen=True)
class Population:
    """Top-k pairs of every rank and expert, int64 [P, E], and tokens of every rank, int64 [P]."""

    counts_PE: Tensor
    tokens_P: Tensor

    @cached_property
    def freq_E(self) -> Tensor:
        """int64: f_E, top-k pairs per expert over all ranks."""
        return self.counts_PE.sum(0)


# Collective, and called by the rules that need it only.
KeySums = Callable[[], tuple[Tensor, Tensor]]


def _no_key_sums() -> tuple[Tensor, Tensor]:
    raise ValueError("this rule weighs scores: it cannot be applied to counts alone")


class Targets(Protocol):
    """f_E -> n_E, int64, by integer arithmetic that is the same on every rank.

    ``tile``: M. ``num_tokens``: tokens of the population, which no expert can exceed.
    ``groups``: equal runs of experts over which ``balance`` levels the tiles. ``seed``: of rules
    that draw. ``key_sums``: for rules that weigh what they move; see `border.key_sums`.
    """

    def __call__(
        self,
        freq_E: Tensor,
        *,
        tile: int,
        num_tokens: int,
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
        num_tokens: int,
        groups: int,
        seed: int = 0,
        key_sums: KeySums | None = None,
    ) -> Tensor:
        return self.targets(
            freq_E,
            tile=tile,
            num_tokens=num_tokens,
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


class Selection(Protocol):
    """[E] int64: how many pairs of each expert this rank changes; they are its best ones.

    ``transport``: of selections that compare the candidates of all ranks; see `transports`.
    """

    def __call__(self, change: Change, *, exchange: Exchange, transport: str) -> Tensor: ...


def may_round_up(freq_E: Tensor, *, tile: int, num_tokens: int) -> Tensor:
    """[E] bool: a tile is started, and its end does not exceed the number of tokens."""
    up_E = (freq_E // tile + 1) * tile
    return (freq_E % tile > 0) & (up_E <= num_tokens)
