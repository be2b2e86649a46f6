"""Routing: which tokens go to which experts, with what weight. The one type of every router.

Flat, because after rounding the number of experts of a token varies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmoe.kernels.routing_index import RoutingIndex, routing_index
from distmoe.routing.pick_pairs import pick_pairs


@dataclass(frozen=True)
class Routing:
    """(token, expert) pairs sorted by (expert, token).

    ``token_N``, ``expert_N`` int32; ``score_N`` fp32, the differentiable weight of a pair;
    ``counts_E`` int32. ``by_token_N`` int32 lists the pairs by (token, expert), which fixes the
    order of sums over a token's pairs; token t owns
    by_token_N[token_offsets_T1[t]:token_offsets_T1[t + 1]].

    Arrays over pairs may be longer than the pairs there are, token_offsets_T1[-1], which then only
    the device knows. Nobody reads what lies behind.
    """

    token_N: Tensor
    expert_N: Tensor
    score_N: Tensor
    counts_E: Tensor
    by_token_N: Tensor
    token_offsets_T1: Tensor
    num_tokens: int
    num_experts: int

    @staticmethod
    def from_mask(
        selected_TE: Tensor, weight_TE: Tensor, *, max_pairs: int | None = None
    ) -> Routing:
        """From the selected pairs [T, E] bool and the weight of every pair [T, E] fp32.

        ``max_pairs``: the length of the arrays, a bound that the host knows; None: as many as
        there are, which waits for the device.
        """
        num_tokens, num_experts = selected_TE.shape
        length = int(selected_TE.sum()) if max_pairs is None else max_pairs
        index = routing_index(selected_TE, max_pairs=length)
        if max_pairs is not None:
            # A bound that is too small would let others read past the arrays. Asked on the device.
            torch._assert_async(
                index.token_offsets_T1[-1] <= max_pairs,
                f"more than max_pairs ({max_pairs}) pairs are selected",
            )
        return Routing(
            **vars(index),
            score_N=_weights(weight_TE, index),
            num_tokens=num_tokens,
            num_experts=num_experts,
        )

    def trimmed(self) -> Routing:
        """Without what lies behind the last pair; waits for the device."""
        return self.first(int(self.token_offsets_T1[-1]))

    def first(self, num_pairs: int) -> Routing:
        """With arrays of that length, which holds all pairs."""
        return replace(
            self,
            token_N=self.token_N[:num_pairs],
            expert_N=self.expert_N[:num_pairs],
            score_N=self.score_N[:num_pairs],
            by_token_N=self.by_token_N[:num_pairs],
        )

    def validate(self) -> None:
        """AssertionError that names the first broken promise of this type; waits for the device."""
        for promise, kept in self.trimmed()._promises():
            if not kept:
                raise AssertionError(f"broken routing: {promise}")

    def _promises(self) -> Iterator[tuple[str, bool]]:
        """Lazily, because the later ones index with what the earlier ones vouch for."""
        ids = (self.token_N, self.expert_N, self.by_token_N, self.counts_E, self.token_offsets_T1)
        yield "integers are int32", all(x.dtype == torch.int32 for x in ids)
        yield "score_N is fp32", self.score_N.dtype == torch.float32
        per_pair = (self.token_N, self.expert_N, self.by_token_N, self.score_N)
        yield "one entry a pair", len({x.shape for x in per_pair}) == 1
        token_N, expert_N, by_token_N = (x.long() for x in ids[:3])
        yield "tokens are in range", _within(token_N, self.num_tokens)
        yield "experts are in range", _within(expert_N, self.num_experts)
        yield "by_token_N is in range", _within(by_token_N, len(token_N))
        yield "pairs ascend by (expert, token)", _ascends(expert_N * self.num_tokens + token_N)
        in_turn_N = (token_N * self.num_experts + expert_N)[by_token_N]
        yield "by_token_N ascends by (token, expert)", _ascends(in_turn_N)
        counted_E = torch.bincount(expert_N, minlength=self.num_experts)
        yield "counts_E counts the pairs", torch.equal(self.counts_E.long(), counted_E)
        bounds_T1 = self.token_offsets_T1.long()
        counted_T = torch.bincount(token_N, minlength=self.num_tokens)
        yield "token_offsets_T1 starts at 0", bool(bounds_T1[0] == 0)
        yield "token_offsets_T1 bounds the tokens", torch.equal(bounds_T1.diff(), counted_T)

    def with_scores(self, weight_TE: Tensor) -> Routing:
        """The same pairs with weights taken from ``weight_TE``."""
        return replace(self, score_N=_weights(weight_TE, self))


def _weights(weight_TE: Tensor, pairs: RoutingIndex | Routing) -> Tensor:
    return pick_pairs(
        weight_TE,
        token_N=pairs.token_N,
        expert_N=pairs.expert_N,
        num_pairs=pairs.token_offsets_T1[-1],
    )


def _within(index: Tensor, bound: int) -> bool:
    return bool(((index >= 0) & (index < bound)).all())


def _ascends(x: Tensor) -> bool:
    return bool((x.diff() > 0).all())
