"""The router's choice: every backend against loops, ties and hard rows included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmoe.kernels.router_topk import ACTIVATIONS, BIAS_LIMIT, Choice, route_top_k
from distmoe.kernels.testing import assert_as_good_as, poisoned_empty
from distmoe.registry import ROUTER_TOPK_BACKENDS

# The sigmoid of a very small number, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Tokens, experts and top-k: no power of two, all chosen, one expert, more than a program's rows.
SHAPES = [(5, 4, 2), (37, 10, 3), (9, 24, 24), (3, 1, 1), (70, 64, 8), (2, 160, 32), (0, 8, 2)]
ROWS = ("normal", "tied", "equal", "extreme")


def logits_of(shape: tuple[int, int, int], rows: str) -> Tensor:
    num_tokens, num_experts, _ = shape
    generator = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    if rows == "tied":
        logits = logits.mul(2).round()
    elif rows == "equal":
        logits = torch.zeros_like(logits)
    elif rows == "extreme":
        logits = logits * 60
    return logits.to(DEVICE)


def bias_of(num_experts: int) -> Tensor:
    """Both limits of a bias, and odd numbers between."""
    bias_E = torch.linspace(-BIAS_LIMIT, BIAS_LIMIT, num_experts, dtype=torch.float64)
    return bias_E.to(torch.int32).roll(num_experts // 2).to(DEVICE)


def chosen_by_loops(key_TE: Tensor, top_k: int) -> Tensor:
    chosen_TE = torch.zeros_like(key_TE, dtype=torch.bool)
    for token, key_E in enumerate(key_TE.tolist()):
        chosen_TE[token, sorted(range(len(key_E)), key=lambda e: (-key_E[e], e))[:top_k]] = True
    return chosen_TE


def check(choice: Choice, top_k: int, bias_E: Tensor | None) -> None:
    """Keys follow from the scores, and the choice from the keys, to the bit."""
    bounded = choice.score_TE.detach().double().clamp(0, 1)
    key_TE = (bounded * 2**24).floor().long() + (0 if bias_E is None else bias_E.long())
    assert choice.key_TE.dtype == torch.int32
    assert torch.equal(choice.key_TE.long(), key_TE)
    assert torch.equal(choice.chosen_TE, chosen_by_loops(choice.key_TE, top_k))


# Every activation in every shape, with all kinds of rows, and with a bias or without.
CASES = [(shape, "normal", activation, False) for shape in SHAPES for activation in ACTIVATIONS]
CASES += [(shape, "tied", "sigmoid", True) for shape in SHAPES]
CASES += [
    (SHAPES[1], rows, activation, biased)
    for rows in ROWS
    for activation in ACTIVATIONS
    for biased in (False, True)
]


@pytest.mark.parametrize(("shape", "rows", "activation", "biased"), dict.fromkeys(CASES), ids=str)
@pytest.mark.parametrize("backend", list(ROUTER_TOPK_BACKENDS))
def test_scores_keys_and_choice(
    backend: str, shape: tuple[int, int, int], rows: str, activation: str, biased: bool
) -> None:
    logits_TE, top_k = logits_of(shape, rows), shape[2]
    bias_E = bias_of(shape[1]) if biased else None
    with poisoned_empty():
        choice = route_top_k(
            logits_TE, top_k=top_k, activation=activation, bias_E=bias_E, backend=backend
        )
    check(choice, top_k, bias_E)
    same = {"softmax": lambda x: x.softmax(1), "sigmoid": torch.sigmoid, "none": torch.clone}
    want = same[activation](logits_TE.double())
    assert_as_good_as(choice.score_TE, same[activation](logits_TE), want.float(), "score")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", list(ROUTER_TOPK_BACKENDS))
def test_gradient(backend: str, activation: str) -> None:
    logits_TE = logits_of((37, 10, 3), "normal")
    weight_TE = logits_of((37, 10, 3), "normal").flip(0)
    same = {"softmax": lambda x: x.softmax(1), "sigmoid": torch.sigmoid, "none": torch.clone}

    def gradient(logits: Tensor, function: object) -> Tensor:
        logits = logits.clone().requires_grad_()
        score = function(logits)  # type: ignore[operator]
        return torch.autograd.grad(score, logits, weight_TE.to(score.dtype))[0]

    with poisoned_empty():
        got = gradient(
            logits_TE,
            lambda x: route_top_k(x, top_k=3, activation=activation, backend=backend).score_TE,
        )
    want = gradient(logits_TE.double(), same[activation])
    assert_as_good_as(got, gradient(logits_TE, same[activation]), want.float())


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", list(ROUTER_TOPK_BACKENDS))
def test_a_row_does_not_depend_on_its_neighbours(backend: str, activation: str) -> None:
    # Rows that are no multiple of a vector of the CPU.
    logits_TE = logits_of((70, 61, 8), "normal")
    whole = route_top_k(logits_TE, top_k=8, activation=activation, backend=backend)
    for rows in (1, 3, 16, 69):
        parts = [
            route_top_k(part, top_k=8, activation=activation, backend=backend)
            for part in logits_TE.split(rows)
        ]
        assert torch.equal(torch.cat([p.score_TE for p in parts]), whole.score_TE)
        assert torch.equal(torch.cat([p.chosen_TE for p in parts]), whole.chosen_TE)


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
@pytest.mark.parametrize("backend", list(ROUTER_TOPK_BACKENDS))
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_diverged_row_still_chooses_as_many_experts(backend: str, activation: str) -> None:
    logits_TE = logits_of((5, 12, 4), "normal")
    logits_TE[1, 3], logits_TE[2] = float("nan"), float("nan")
    choice = route_top_k(logits_TE, top_k=4, activation=activation, backend=backend)
    assert choice.chosen_TE.sum(1).tolist() == [4] * 5


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", list(ROUTER_TOPK_BACKENDS))
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_diverged_rows_take_the_experts_in_turn(
    backend: str, activation: str, biased: bool
) -> None:
    """Above a row of numbers, and more of them than there are experts."""
    logits_TE = logits_of((37, 12, 5), "normal")
    logits_TE[1:] = float("nan")
    bias_E = bias_of(12) if biased else None
    choice = route_top_k(logits_TE, top_k=5, activation=activation, bias_E=bias_E, backend=backend)
    check(Choice(*(part[:1] for part in vars(choice).values())), 5, bias_E)
    for token in range(1, 37):
        in_turn = [(token * 5 + j) % 12 for j in range(12)]
        assert choice.key_TE[token].argsort(descending=True).tolist() == in_turn
        assert choice.chosen_TE[token].nonzero().flatten().tolist() == sorted(in_turn[:5])


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="activation is 'tanh'; it must be one of softmax"):
        route_top_k(torch.zeros(1, 2), top_k=1, activation="tanh")
