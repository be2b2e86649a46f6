"""Parts of sequences on the ranks of a cp axis, and whole sequences of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from distmoe.comm.context import ContextPart, SequenceGather


def test_parts_by_hand() -> None:
    assert ContextPart(0, 2).positions(4).tolist() == [0, 1, 6, 7]
    assert ContextPart(1, 2).positions(4).tolist() == [2, 3, 4, 5]
    assert ContextPart.of_rank(7, 3) == ContextPart(1, 3)
    assert ContextPart().positions(3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_are_all_positions_and_even_work(size: int) -> None:
    parts = [ContextPart(rank, size).positions(6) for rank in range(size)]
    assert torch.cat(parts).sort().values.tolist() == list(range(6 * size))
    # A query at position p sees p + 1 keys.
    assert len({int((part + 1).sum()) for part in parts}) == 1


def test_whole_sequences_and_their_gradients() -> None:
    """Gradients in bf16 are rounded once, after the sum over the ranks; a message has what the
    ranks lack and no more."""
    size, own = 3, 4
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    k_BASD, v_BASD = drawn(2, 2, own * size, 5), drawn(2, 2, own * size, 3)
    dk_RBASD, dv_RBASD = drawn(size, *k_BASD.shape), drawn(size, *v_BASD.shape)

    def on_rank(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, int]]:
        gather = SequenceGather(dist.group.WORLD)
        own_S = gather.part.positions(own)
        mine = [x[:, :, own_S].requires_grad_() for x in (k_BASD, v_BASD)]
        k, v = gather(*mine)
        torch.autograd.backward((k, v), (dk_RBASD[rank], dv_RBASD[rank]))
        sent = gather.exchange.traffic.bytes_sent
        return k.detach(), v.detach(), mine[0].grad, mine[1].grad, sent

    for rank, (k, v, dk, dv, sent) in enumerate(run_ranks(on_rank, size)):
        assert torch.equal(k, k_BASD)
        assert torch.equal(v, v_BASD)
        own_S = ContextPart(rank, size).positions(own)
        assert torch.equal(dk, dk_RBASD.float().sum(0).bfloat16()[:, :, own_S])
        assert torch.equal(dv, dv_RBASD.float().sum(0).bfloat16()[:, :, own_S])
        once = 2 * (size - 1) * 2 * 2 * own * (5 + 3)
        assert sent == {"keys and values": once, "gradients of keys and values": once}
