"""Micro-batches of one rank, a pure function of the step, read ahead by one step.

Micro-batch m of rank r holds positions (m * world + r) * micro_batch_size + i of the global batch,
so that the tokens of neighbouring ranks, an expert-parallel group, are contiguous. Under context
parallelism r and world count groups of cp ranks, each of which takes its part of the sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmoe.comm.context import ContextPart
from distmoe.data.corpora import Samples
from distmoe.data.mixture import MixtureSampler
from distmoe.data.sampler import GlobalBatchSampler
from distmoe.data.tokens import TokenSplit
from distmoe.model.linear_cross_entropy import IGNORE


@dataclass(frozen=True)
class Batch:
    """A micro-batch. All int64 on the CPU, [micro_batch_size, seq_len / cp]."""

    tokens_BS: Tensor
    labels_BS: Tensor
    """The next token of every position, across document boundaries unless these are masked; then
    IGNORE where the next token is another document's first."""
    start_BS: Tensor | None = None
    """With masked boundaries: the position in its row at which each position's document begins."""
    position_S: Tensor | None = None
    """Of the columns in their rows; None: all, in order."""

    def of_part(self, part: ContextPart) -> Batch:
        """What a rank of a cp axis has of this batch, whose rows are whole."""
        if part.size == 1:
            return self
        own_S = part.positions(self.tokens_BS.shape[1] // part.size)
        start_BS = None if self.start_BS is None else self.start_BS[:, own_S]
        return Batch(self.tokens_BS[:, own_S], self.labels_BS[:, own_S], start_BS, own_S)

    def sum_of_squares(self) -> int:
        """Sum of n^2 over the documents of all rows, n their tokens in the row; a row without
        masked boundaries counts as one document. Of a part of the rows, its share of the sum."""
        position_S = self.position_S
        if position_S is None:
            position_S = torch.arange(self.tokens_BS.shape[1])
        start_BS = torch.zeros_like(self.tokens_BS) if self.start_BS is None else self.start_BS
        # The squares are the sums of odd numbers.
        return int((2 * (position_S - start_BS) + 1).sum())


def rank_positions(
    global_batch_size: int, micro_batch_size: int, *, rank: int, world: int, cp: int = 1
) -> NDArray[np.int64]:
    """Positions of this rank in a global batch, [micro-batches, micro_batch_size]; ``cp``
    neighbouring ranks have the same.

    ValueError if the global batch is not a whole number of micro-batches on every rank.
    """
    groups, left = divmod(world, cp)
    together = groups * micro_batch_size
    if together < 1 or left or global_batch_size % together:
        raise ValueError(
            f"train.global_batch_size is {global_batch_size}; it must be a multiple of "
            f"world / parallel.cp * train.micro_batch_size ({world} / {cp} * {micro_batch_size})"
        )
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}; it must be in 0..{world - 1}")
    positions = np.arange(global_batch_size, dtype=np.int64)
    return positions.reshape(-1, groups, micro_batch_size)[:, rank // cp]


class Batches:
    """This rank's share of every global batch of the sampler. Close it, or use it in a `with`.

    ``cp``: ranks that share sequences. ``document_mask``: mask the boundaries of documents.
    """

    def __init__(
        self,
        split: Samples,
        sampler: GlobalBatchSampler | MixtureSampler,
        *,
        seq_len: int,
        rank: int,
        world: int,
        micro_batch_size: int,
        cp: int = 1,
        document_mask: bool = False,
    ) -> None:
        if sampler.num_samples != split.num_samples(seq_len):
            raise ValueError(
                f"the sampler has {sampler.num_samples} samples; split '{split.split}' has "
                f"{split.num_samples(seq_len)} of data.seq_len {seq_len}"
            )
        self._split = split
        self._sampler = sampler
        self._seq_len = seq_len
        self._document_mask = document_mask
        self._part = ContextPart.of_rank(rank, cp)
        self._positions = rank_positions(
            sampler.global_batch_size, micro_batch_size, rank=rank, world=world, cp=cp
        )
        self._reader = ThreadPoolExecutor(1, "distmoe-data")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of this rank in global batch ``step``, counted from 0."""
        ahead, self._ahead = self._ahead, None
        hit = ahead is not None and ahead[0] == step
        batches = ahead[1].result() if ahead is not None and hit else self._load(step)
        self._ahead = (step + 1, self._reader.submit(self._load, step + 1))
        return batches

    def close(self) -> None:
        """Stop the reading thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._ahead = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, step: int) -> list[Batch]:
        samples = self._sampler.indices(step)[self._positions]
        return [
            _read_batch(self._split, row, self._seq_len, document_mask=self._document_mask).of_part(
                self._part
            )
            for row in samples
        ]


def validation_batches(
    split: TokenSplit,
    count: int,
    *,
    global_batch_size: int,
    seq_len: int,
    rank: int,
    world: int,
    micro_batch_size: int,
    cp: int = 1,
    document_mask: bool = False,
) -> Iterator[list[Batch]]:
    """This rank's share of the first ``count`` global batches of a split, unshuffled.

    ValueError, at the call, if the split is too short for them.
    """
    needed, there = count * global_batch_size, split.num_samples(seq_len)
    if there < needed:
        raise ValueError(
            f"{split.directory}: its {split.split} split has {split.num_tokens} "
            f"tokens, {there} samples of data.seq_len {seq_len}, and needs {needed} "
            f"(train.validation_batches {count} * train.global_batch_size {global_batch_size})"
        )
    positions = rank_positions(global_batch_size, micro_batch_size, rank=rank, world=world, cp=cp)
    part = ContextPart.of_rank(rank, cp)
    return (
        [
            _read_batch(split, row, seq_len, document_mask=document_mask).of_part(part)
            for row in step * global_batch_size + positions
        ]
        for step in range(count)
    )


def _read_batch(
    split: Samples, samples: NDArray[np.int64], seq_len: int, *, document_mask: bool
) -> Batch:
    window = torch.from_numpy(np.stack([split.sample(int(i), seq_len) for i in samples]))
    batch = Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())
    return mask_documents(batch, eod_id=split.eod_id) if document_mask else batch


def mask_documents(batch: Batch, *, eod_id: int) -> Batch:
    """``batch`` with its boundaries masked: a document ends with the token ``eod_id``, and that
    token predicts nothing."""
    ends_BS = batch.tokens_BS == eod_id
    positions = torch.arange(ends_BS.shape[1])
    # A document begins behind the last end before it, or at 0, which is also what the row's last
    # end rolls to.
    begins_BS = torch.where(ends_BS.roll(1, dims=1), positions, 0)
    start_BS = begins_BS.cummax(dim=1).values
    return Batch(batch.tokens_BS, batch.labels_BS.masked_fill(ends_BS, IGNORE), start_BS)
