"""Pairs of all sources in the order of their arrival: every backend against a sort."""

from __future__ import annotations

import pytest
import torch

from distmoe.kernels.arrange_pairs import Messages, arrange_pairs, triton_backend
from distmoe.kernels.testing import poisoned_empty
from distmoe.registry import ARRANGE_PAIRS_BACKENDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Ranks, experts of a rank, runs of a source, most rows of a source.
CASES = [
    (2, 1, 1, 9),
    (3, 4, 1, 60),
    (5, 3, 3, 40),
    (4, 2, 5, 3),
    (3, 2, 2, 0),
]


class Arrivals:
    """Made up: rows of every source and run, the experts of every row, and an order of the runs."""

    def __init__(self, ranks: int, experts: int, runs: int, most: int) -> None:
        g = torch.Generator().manual_seed(ranks * 100 + most)
        self.rank, self.experts = ranks - 1, experts
        width = max(runs, 2)
        self.relayed_PC = torch.randint(0, 9, (ranks, runs), generator=g)
        self.rows_PC = torch.zeros(ranks, width, dtype=torch.int64)
        head_PC = torch.zeros(ranks, runs, dtype=torch.int64)
        # A source has nothing for this rank.
        num_P = [
            0 if p == 1 else int(torch.randint(most + 1, (), generator=g)) for p in range(ranks)
        ]
        # Source, expert, row and bits of the score, in the order of the messages.
        self.pairs: list[tuple[int, int, int, int]] = []
        parts = []
        for p, num in enumerate(num_P):
            cuts = torch.randint(num + 1, (runs - 1,), generator=g).sort().values.tolist()
            head_PC[p] = torch.tensor([0, *cuts, num]).diff()
            own = torch.tensor([num - num // 2, num // 2])
            told = own if p == self.rank else head_PC[p]
            self.rows_PC[p, : len(told)] = told
            has_RE = torch.rand(num, experts, generator=g) < 0.5
            # A row is there for a pair of its own.
            has_RE[torch.arange(num), torch.randint(experts, (num,), generator=g)] = True
            found = has_RE.T.nonzero()
            score = torch.rand(len(found), generator=g).view(torch.int32)
            self.pairs += [
                (p, int(i), int(r), int(s)) for (i, r), s in zip(found, score, strict=True)
            ]
            parts += [torch.stack([head_PC[p], self.relayed_PC[p]], dim=1)]
            parts += [torch.stack([found[:, 1], score], dim=1)]
        order = [(p, c) for p in range(ranks) for c in range(width) if p == self.rank or c < runs]
        self.order = [order[i] for i in torch.randperm(len(order), generator=g)]
        self.from_Pe = torch.zeros(ranks, experts, dtype=torch.int64)
        for p, i, _, _ in self.pairs:
            self.from_Pe[p, i] += 1
        # As a rank's columns of a wider table, which is not contiguous.
        table = torch.cat([self.from_Pe, self.from_Pe], dim=1).to(DEVICE)
        message_X2, pairs_P = torch.cat(parts).int().to(DEVICE), self.from_Pe.sum(1).tolist()
        self.messages = Messages(message_X2, table[:, experts:], pairs_P, self.rank, runs)
        place_A = [p * width + c for p, c in self.order]
        self.place_A = torch.tensor(place_A, dtype=torch.int32, device=DEVICE)

    def arrival(self, source: int, row: int) -> tuple[int, int]:
        """The number of the arrival that brings a row, and its place among all that arrive."""
        ends = self.rows_PC[source].cumsum(0).tolist()
        run = sum(end <= row for end in ends)
        number = self.order.index((source, run))
        before = sum(int(self.rows_PC[place]) for place in self.order[:number])
        return number, before + row - (ends[run] - int(self.rows_PC[source, run]))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", list(ARRANGE_PAIRS_BACKENDS))
def test_order(
    backend: str, case: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several turns of every loop.
    monkeypatch.setattr(triton_backend, "BLOCK_SEGMENTS", 8)
    monkeypatch.setattr(triton_backend, "BLOCK_PAIRS", 16)
    arrivals = Arrivals(*case)
    placed = []
    counts = [[0] * arrivals.experts for _ in arrivals.order]
    for n, (source, expert, row, score) in enumerate(arrivals.pairs):
        number, place = arrivals.arrival(source, row)
        counts[number][expert] += 1
        placed.append((expert, number, place, score, n))
    placed.sort()
    with poisoned_empty():
        arranged = arrange_pairs(arrivals.messages, arrivals.place_A, backend=backend)
    assert arranged.row_L.tolist() == [row for _, _, row, _, _ in placed]
    assert arranged.score_L.view(torch.int32).tolist() == [score for *_, score, _ in placed]
    assert arranged.place_L[[n for *_, n in placed]].tolist() == list(range(len(placed)))
    assert arranged.offsets_e1.diff().tolist() == arrivals.from_Pe.sum(0).tolist()
    assert arranged.offsets_e1[0] == 0
    assert arranged.rows_A.tolist() == [int(arrivals.rows_PC[place]) for place in arrivals.order]
    assert arranged.counts_Ae.tolist() == counts
    assert arranged.relayed_PC.tolist() == arrivals.relayed_PC.tolist()
    assert arranged.score_L.dtype == torch.float32
    assert arranged.row_L.dtype == arranged.offsets_e1.dtype == torch.int32
    sizes = (arranged.place_L, arranged.rows_A, arranged.counts_Ae, arranged.relayed_PC)
    assert {x.dtype for x in sizes} == {torch.int64}
