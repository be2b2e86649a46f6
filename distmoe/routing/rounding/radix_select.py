"""The lowest keys of every expert over all ranks, digit by digit: a radix select.

All ranks add up how many of an expert's pairs have each value of the highest digit, which tells the
value that the border has; then the same of the next digit, of the pairs that agree so far. Its
messages are E * 512 numbers for each of 3 digits, however many pairs lie below the border.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmoe.comm import Exchange
from distmoe.kernels.round_select import KEY_LIMIT
from distmoe.kernels.routing_index import routing_index
from distmoe.routing.routers import Scores

# Of a key, which lies within KEY_LIMIT of 0: 3 * 9 = 27.
DIGITS, DIGIT_BITS = 3, 9
VALUES = 1 << DIGIT_BITS


@dataclass(frozen=True)
class KeyedPairs:
    """The pairs that top-k chose on this rank, sorted by (expert, token), all int64: ``expert_N``;
    ``key_N``, above the lowest key; ``place_N`` in [T, E], of the shape ``shape``."""

    expert_N: Tensor
    key_N: Tensor
    place_N: Tensor
    shape: torch.Size

    @staticmethod
    def of(scores: Scores) -> KeyedPairs:
        num_tokens, num_experts = shape = scores.chosen_TE.shape
        # Every token chose top_k, so that none is left out, and nothing lies behind the last.
        index = routing_index(scores.chosen_TE, max_pairs=num_tokens * scores.top_k)
        place_N = index.token_N.long() * num_experts + index.expert_N
        key_N = scores.key_TE.reshape(-1)[place_N].long() + KEY_LIMIT
        return KeyedPairs(index.expert_N.long(), key_N, place_N, shape)

    def count(self, flag_N: Tensor) -> Tensor:
        """[E] int64: the pairs of each expert with the flag."""
        count_E = flag_N.new_zeros(self.shape[1], dtype=torch.int64)
        return count_E.scatter_add_(0, self.expert_N, flag_N.long())

    def below(self, limit_E: Tensor) -> Tensor:
        """[N] bool: key < limit."""
        return self.key_N < limit_E[self.expert_N]

    def at(self, limit_E: Tensor) -> Tensor:
        """[N] bool: key = limit."""
        return self.key_N == limit_E[self.expert_N]

    def last(self, flag_N: Tensor, amount_E: Tensor) -> Tensor:
        """[N] bool: of the pairs of each expert with the flag the last ``amount_E``, in the order
        of tokens."""
        through_E = self.count(flag_N).cumsum(0)
        later_N = through_E[self.expert_N] - flag_N.cumsum(0)
        return flag_N & (later_N < amount_E[self.expert_N])

    def mask(self, flag_N: Tensor) -> Tensor:
        """[T, E] bool: the pairs with the flag."""
        mask = flag_N.new_zeros(self.shape.numel())
        return mask.scatter_(0, self.place_N, flag_N).view(self.shape)


def border(pairs: KeyedPairs, amount_E: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """int64 [E] twice: the lowest ``amount_E`` keys of each expert over the ranks are those below a
    limit, and so many of those at it; collective. An expert has as many pairs. Where the amount is
    0 nothing is below the limit."""
    limit_E = torch.zeros_like(amount_E)
    left_E = amount_E
    for digit in reversed(range(DIGITS)):
        shift = digit * DIGIT_BITS
        count_EV = exchange.all_reduce(_histogram(pairs, limit_E, shift), kind="key counts")
        through_EV = count_EV.cumsum(1)
        value_E1 = (through_EV < left_E[:, None]).sum(1, keepdim=True)
        below_E1 = (through_EV - count_EV).gather(1, value_E1)
        limit_E = limit_E + (value_E1.squeeze(1) << shift)
        left_E = left_E - below_E1.squeeze(1)
    return limit_E, left_E


def _histogram(pairs: KeyedPairs, limit_E: Tensor, shift: int) -> Tensor:
    """[E, VALUES] int32: values of the digit, of the pairs whose higher digits are the limit's."""
    higher = shift + DIGIT_BITS
    agrees_N = pairs.key_N >> higher == (limit_E >> higher)[pairs.expert_N]
    value_N = (pairs.key_N >> shift) & (VALUES - 1)
    num_experts = len(limit_E)
    count = agrees_N.new_zeros(num_experts * VALUES, dtype=torch.int32)
    count.scatter_add_(0, pairs.expert_N * VALUES + value_N, agrees_N.int())
    return count.view(num_experts, VALUES)
