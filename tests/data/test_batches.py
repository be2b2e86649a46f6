from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distmoe.comm.context import ContextPart
from distmoe.data.batches import Batch, Batches, validation_batches
from distmoe.data.sampler import GlobalBatchSampler
from distmoe.data.tokens import TokenSplit

SEQ_LEN, GLOBAL_BATCH, STEPS = 16, 8, 30


def open_batches(split: TokenSplit, *, rank: int = 0, world: int = 1, micro: int = 2) -> Batches:
    sampler = GlobalBatchSampler(split.num_samples(SEQ_LEN), GLOBAL_BATCH, seed=5)
    return Batches(
        split,
        sampler,
        seq_len=SEQ_LEN,
        rank=rank,
        world=world,
        micro_batch_size=micro,
    )


def in_global_order(per_rank: Sequence[Sequence[Batch]]) -> Tensor:
    """Rows of all ranks: micro-batch by micro-batch, and rank by rank inside one."""
    return torch.cat([batch.tokens_BS for micro in zip(*per_rank, strict=True) for batch in micro])


@pytest.fixture(scope="module")
def split(prepared: Path) -> TokenSplit:
    return TokenSplit(prepared, "train")


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_global_batch_does_not_depend_on_the_ranks(
    split: TokenSplit, world: int, micro: int
) -> None:
    sampler = GlobalBatchSampler(split.num_samples(SEQ_LEN), GLOBAL_BATCH, seed=5)
    ranks = [open_batches(split, rank=rank, world=world, micro=micro) for rank in range(world)]
    for step in range(STEPS):
        rows = in_global_order([rank.step(step) for rank in ranks])
        samples = [split.sample(int(i), SEQ_LEN)[:-1] for i in sampler.indices(step)]
        assert rows.tolist() == [sample.tolist() for sample in samples]
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("masked", [False, True])
def test_ranks_that_share_sequences_have_their_parts(split: TokenSplit, masked: bool) -> None:
    """Four ranks, two by two: together what two ranks have."""

    def read(rank: int, world: int, cp: int) -> list[Batch]:
        sampler = GlobalBatchSampler(split.num_samples(SEQ_LEN), GLOBAL_BATCH, seed=5)
        layout = {"rank": rank, "world": world, "micro_batch_size": 2, "cp": cp}
        made = Batches(split, sampler, seq_len=SEQ_LEN, document_mask=masked, **layout)
        with made as batches:
            return batches.step(3)

    for group in range(2):
        parts = [read(2 * group + place, 4, 2) for place in range(2)]
        for whole, *both in zip(read(group, 2, 1), *parts, strict=True):
            own_S = torch.cat([ContextPart(place, 2).positions(SEQ_LEN // 2) for place in range(2)])
            for name in ("tokens_BS", "labels_BS", *(["start_BS"] if masked else [])):
                joined = torch.cat([getattr(part, name) for part in both], dim=1)
                assert torch.equal(joined, getattr(whole, name)[:, own_S])
            assert sum(part.sum_of_squares() for part in both) == whole.sum_of_squares()


def test_labels_are_the_next_tokens(split: TokenSplit) -> None:
    with open_batches(split) as batches:
        for batch in batches.step(0):
            assert batch.tokens_BS.shape == batch.labels_BS.shape == (2, SEQ_LEN)
            assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
            assert batch.labels_BS.is_contiguous()
            assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])


@pytest.mark.parametrize("steps", [range(5), [3, 4, 9, 2, 2, 3]])
def test_prefetch_changes_nothing(split: TokenSplit, steps: Iterable[int]) -> None:
    with open_batches(split) as ahead:
        for step in steps:
            with open_batches(split) as anew:
                first = anew.step(step)
            for left, right in zip(ahead.step(step), first, strict=True):
                assert torch.equal(left.tokens_BS, right.tokens_BS)
                assert torch.equal(left.labels_BS, right.labels_BS)


def test_prefetch_reads_the_next_step_on_another_thread(
    split: TokenSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[tuple[int, bool]] = []
    load = Batches._load

    def recorded(self: Batches, step: int) -> list[Batch]:
        loads.append((step, threading.current_thread() is threading.main_thread()))
        return load(self, step)

    monkeypatch.setattr(Batches, "_load", recorded)
    with open_batches(split) as batches:
        batches.step(7)
        batches.step(8)
    assert loads[:2] == [(7, True), (8, False)]


def test_prefetch_error_reaches_the_caller(
    split: TokenSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = open_batches(split)
    monkeypatch.setattr(TokenSplit, "sample", lambda *_: 1 / 0)
    assert batches._reader is not None
    batches._ahead = (3, batches._reader.submit(batches._load, 3))
    with pytest.raises(ZeroDivisionError):
        batches.step(3)
    batches.close()


def read_validation(split: TokenSplit, count: int, *, world: int, micro: int) -> Tensor:
    ranks = [
        list(
            validation_batches(
                split,
                count,
                global_batch_size=4,
                seq_len=SEQ_LEN,
                rank=rank,
                world=world,
                micro_batch_size=micro,
            )
        )
        for rank in range(world)
    ]
    return torch.cat([in_global_order(list(step)) for step in zip(*ranks, strict=True)])


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (1, 1), (2, 1), (2, 2), (4, 1)])
def test_validation_is_the_start_of_the_split(prepared: Path, world: int, micro: int) -> None:
    split = TokenSplit(prepared, "validation")
    rows = read_validation(split, 3, world=world, micro=micro)
    assert rows.flatten().tolist() == split.read(0, 12 * SEQ_LEN).tolist()


def test_short_validation_split_is_named_at_the_call(prepared: Path) -> None:
    split = TokenSplit(prepared, "validation")
    there = split.num_samples(SEQ_LEN)
    with pytest.raises(ValueError, match=rf"{there} samples .* needs 4000 "):
        validation_batches(
            split,
            1000,
            global_batch_size=4,
            seq_len=SEQ_LEN,
            rank=0,
            world=1,
            micro_batch_size=1,
        )


def test_wrong_layouts_are_refused(split: TokenSplit) -> None:
    with pytest.raises(ValueError, match=r"train.global_batch_size is 8; .* \(3 / 1 \* 2\)"):
        open_batches(split, world=3)
    with pytest.raises(ValueError, match=r"rank is 2; it must be in 0..1"):
        open_batches(split, rank=2, world=2)
    sampler = GlobalBatchSampler(3, GLOBAL_BATCH, seed=5)
    with pytest.raises(ValueError, match="the sampler has 3 samples"):
        Batches(split, sampler, seq_len=SEQ_LEN, rank=0, world=1, micro_batch_size=1)
