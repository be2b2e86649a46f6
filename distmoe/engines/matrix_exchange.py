"""Work on whole matrices whose rows lie on several ranks.

FSDP cuts a weight [..., rows, columns] by rows: rank r of n has rows r c to (r + 1) c, with
c = ceil(rows / n), so the last ones may have fewer, or none. Every matrix gets one rank as its
owner, by cost, so that the work is spread. One all-to-all brings the owners their matrices,
another one takes the results back; each rank sends and receives about as much as it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Stack:
    """The matrices of a weight: ``batch`` times those of ``rows``, below one another, all with
    ``columns``."""

    batch: int
    rows: tuple[int, ...]
    columns: int


@dataclass(frozen=True)
class Matrix:
    """Rows ``begin`` to ``end`` of weight number ``weight``, at ``index`` of its batch."""

    weight: int
    index: int
    begin: int
    end: int
    columns: int

    @property
    def cost(self) -> int:
        """In proportion to the products of matrices that Newton-Schulz takes."""
        rows = self.end - self.begin
        return rows * self.columns * min(rows, self.columns)


class MatrixExchange:
    """Over ``group``, whose ranks share the rows of all ``stacks``; made alike on all of them."""

    def __init__(self, stacks: Sequence[Stack], group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._first = [_first_rows(sum(stack.rows), self.size) for stack in stacks]
        self.owned = _owners(_matrices(stacks), self.size)
        ranks = range(self.size)
        self._to_owners = [self._elements(self.rank, self.owned[owner]) for owner in ranks]
        self._from_ranks = [self._elements(rank, self.owned[self.rank]) for rank in ranks]

    def apply_(self, rows: Sequence[Tensor], work: Callable[[Tensor], Tensor]) -> None:
        """Replace ``rows``, this rank's [batch, rows, columns] of every weight, by its rows of what
        ``work`` makes of whole matrices [B, M, N], B of one shape at a time; collective."""
        own = self.owned[self.rank]
        whole = self._gather(rows)
        by_shape: dict[torch.Size, list[int]] = {}
        for number, matrix in enumerate(whole):
            by_shape.setdefault(matrix.shape, []).append(number)
        for numbers in by_shape.values():
            done = work(torch.stack([whole[number] for number in numbers]))
            for number, matrix in zip(numbers, done, strict=True):
                whole[number] = matrix
        self._scatter(dict(zip(own, whole, strict=True)), rows)

    def _gather(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The matrices that this rank owns."""
        own = self.owned[self.rank]
        sent = [self._part(rows, matrix).flatten() for owned in self.owned for matrix in owned]
        received = self._all_to_all(torch.cat(sent), self._to_owners, self._from_ranks)
        by_rank = [
            torch.split(part, [self._elements(rank, [matrix]) for matrix in own])
            for rank, part in enumerate(torch.split(received, self._from_ranks))
        ]
        return [
            torch.cat(parts).view(-1, matrix.columns)
            for matrix, *parts in zip(own, *by_rank, strict=True)
        ]

    def _scatter(self, whole: dict[Matrix, Tensor], rows: Sequence[Tensor]) -> None:
        """What this rank owns to those that hold its rows."""
        sent = [
            matrix_MN[slice(*self._span(rank, matrix))].flatten()
            for rank in range(self.size)
            for matrix, matrix_MN in whole.items()
        ]
        packed = torch.cat(sent) if sent else rows[0].new_empty(0)
        received = self._all_to_all(packed, self._from_ranks, self._to_owners)
        owned = [matrix for matrices in self.owned for matrix in matrices]
        sizes = [self._elements(self.rank, [matrix]) for matrix in owned]
        for matrix, part in zip(owned, torch.split(received, sizes), strict=True):
            own = self._part(rows, matrix)
            own.copy_(part.view_as(own))

    def _all_to_all(self, packed: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = packed.new_empty(sum(received))
        dist.all_to_all_single(out, packed, received, sent, group=self.group)
        return out

    def _span(self, rank: int, matrix: Matrix) -> tuple[int, int]:
        """The rows of a matrix, counted in it, that ``rank`` holds."""
        first = self._first[matrix.weight]
        begin = min(max(first[rank], matrix.begin), matrix.end)
        end = min(max(first[rank + 1], matrix.begin), matrix.end)
        return begin - matrix.begin, end - matrix.begin

    def _elements(self, rank: int, matrices: Sequence[Matrix]) -> int:
        """Of ``matrices``, on ``rank``."""
        spans = [(self._span(rank, matrix), matrix.columns) for matrix in matrices]
        return sum((end - begin) * columns for (begin, end), columns in spans)

    def _part(self, rows: Sequence[Tensor], matrix: Matrix) -> Tensor:
        """This rank's rows of a matrix, as a view."""
        begin, end = self._span(self.rank, matrix)
        offset = matrix.begin - self._first[matrix.weight][self.rank]
        return rows[matrix.weight][matrix.index, max(0, begin + offset) : max(0, end + offset)]


def _first_rows(rows: int, ranks: int) -> list[int]:
    """The first row of every rank, and the end."""
    chunk = -(-rows // ranks)
    return [min(rank * chunk, rows) for rank in range(ranks + 1)]


def _matrices(stacks: Sequence[Stack]) -> list[Matrix]:
    found = []
    for weight, stack in enumerate(stacks):
        for index in range(stack.batch):
            begin = 0
            for rows in stack.rows:
                found.append(Matrix(weight, index, begin, begin + rows, stack.columns))
                begin += rows
    return found


def _owners(matrices: list[Matrix], ranks: int) -> list[list[Matrix]]:
    """The matrices of each rank: the most expensive first, to the rank with the least so far."""
    owned: list[list[Matrix]] = [[] for _ in range(ranks)]
    costs = [0] * ranks
    for matrix in sorted(matrices, key=lambda matrix: -matrix.cost):
        owner = costs.index(min(costs))
        owned[owner].append(matrix)
        costs[owner] += matrix.cost
    return owned
