"""Which pairs an expert drops or adds first: every backend against sorted lists."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmoe.kernels.round_select import (
    NOTHING,
    RoundSelect,
    load_round_select,
    triton_backend,
)
from distmoe.kernels.testing import poisoned_empty
from distmoe.registry import ROUND_SELECT_BACKENDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Tokens, experts, and how many different keys there are: few keys are many ties.
CASES = [
    (40, 6, 1 << 24),
    (40, 6, 3),
    (200, 5, 2),
    (1, 4, 9),
    (130, 33, 50),
    (700, 3, 4),
    (0, 4, 1),
]


def with_sizes(*sizes: int) -> list[tuple[tuple[int, int, int], int]]:
    """Every case with every size; the one of many experts, slow to interpret, with the second."""
    return [(case, size) for case in CASES for size in sizes if case[1] < 33 or size == sizes[1]]


def problem(case: tuple[int, int, int], *, signed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_experts, keys = case
    generator = torch.Generator().manual_seed(sum(case))
    key_TE = torch.randint(0, keys, (num_tokens, num_experts), generator=generator).int()
    if signed:
        key_TE = (key_TE - keys // 2) * 2
    chosen_TE = torch.rand(num_tokens, num_experts, generator=generator) < 0.4
    adds_E = torch.rand(num_experts, generator=generator) < 0.5
    return key_TE.to(DEVICE), chosen_TE.to(DEVICE), adds_E.to(DEVICE)


def in_order(key_TE: Tensor, chosen_TE: Tensor, adds: bool, expert: int) -> list[int]:
    """Eligible tokens of an expert, the first to change first."""
    key_T, chosen_T = key_TE[:, expert].tolist(), chosen_TE[:, expert].tolist()
    eligible = [t for t in range(len(key_T)) if chosen_T[t] != adds]
    return sorted(eligible, key=lambda t: (-key_T[t], t) if adds else (key_T[t], -t))


def load(backend: str, like: Tensor) -> RoundSelect:
    return load_round_select(like, backend)


@pytest.mark.parametrize(
    ("case", "most", "signed"),
    [
        *((case, most, False) for case, most in with_sizes(1, 7, 127)),
        *((case, 7, True) for case in CASES),
        (CASES[0], 0, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", list(ROUND_SELECT_BACKENDS))
def test_take(backend: str, case: tuple[int, int, int], most: int, signed: bool) -> None:
    key_TE, chosen_TE, adds_E = problem(case, signed=signed)
    orders = [in_order(key_TE, chosen_TE, bool(adds), e) for e, adds in enumerate(adds_E)]
    amounts = [min(len(order), most - i % 3) if most else 0 for i, order in enumerate(orders)]
    amounts = [max(amount, 0) for amount in amounts]
    want_TE = chosen_TE.clone()
    for expert, (order, amount) in enumerate(zip(orders, amounts, strict=True)):
        want_TE[order[:amount], expert] ^= True
    with poisoned_empty():
        select = load(backend, key_TE)
        priority_ET = select.priorities(key_TE, chosen_TE, adds_E)
        amount_E = torch.tensor(amounts, device=DEVICE)
        got_TE = select.take(chosen_TE, priority_ET, amount_E, adds_E, most=most)
    assert torch.equal(got_TE, want_TE)


@pytest.mark.parametrize(("case", "num"), with_sizes(1, 5, 127), ids=str)
@pytest.mark.parametrize("backend", list(ROUND_SELECT_BACKENDS))
def test_best(backend: str, case: tuple[int, int, int], num: int) -> None:
    key_TE, chosen_TE, adds_E = problem(case)
    with poisoned_empty():
        select = load(backend, key_TE)
        best_EC = select.best(select.priorities(key_TE, chosen_TE, adds_E), num)
    for expert, adds in enumerate(adds_E.tolist()):
        order = in_order(key_TE, chosen_TE, adds, expert)[:num]
        signed = [int(key_TE[t, expert]) * (1 if adds else -1) for t in order]
        assert best_EC[expert].tolist() == signed + [NOTHING] * (num - len(signed))


def test_a_column_that_does_not_fit_into_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TAKE", "BEST"):
        monkeypatch.setattr(
            f"distmoe.kernels.round_select.triton_backend.WHOLE_COLUMN_OF_{name}", 128
        )
    # Shorter and longer than that.
    for case in (CASES[0], (300, 2, 4)):
        test_take("triton", case, 7, signed=False)
        test_best("triton", case, 127)


@pytest.mark.parametrize(("ranks", "num", "keys"), [(3, 7, 5), (5, 3, 3)])
@pytest.mark.parametrize("backend", list(ROUND_SELECT_BACKENDS))
def test_merge(
    backend: str, ranks: int, num: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of five ranks a program counts four at a time.
    monkeypatch.setattr(triton_backend, "MERGED", 16 if ranks == 5 else 64)
    generator = torch.Generator().manual_seed(num)
    best_PEC = torch.randint(-keys, keys, (ranks, 3, num), generator=generator).int()
    best_PEC[torch.rand(best_PEC.shape, generator=generator) < 0.2] = NOTHING
    best_PEC = best_PEC.sort(dim=2, descending=True).values
    adds_E = torch.tensor([True, False, True])
    amount_E = torch.tensor([num, num - 1, 0])
    merge = load(backend, best_PEC.to(DEVICE)).merge
    accepted_PE = merge(best_PEC.to(DEVICE), adds_E.to(DEVICE), amount_E.to(DEVICE))
    for e, amount in enumerate(amount_E.tolist()):
        turn = 1 if adds_E[e] else -1
        candidates = [(-key, turn * p) for p in range(ranks) for key in best_PEC[p, e].tolist()]
        taken = [turn * p for _, p in sorted(candidates)[:amount]]
        assert accepted_PE[:, e].tolist() == [taken.count(p) for p in range(ranks)]
    assert accepted_PE.dtype == torch.int64
