"""What is sent is not touched before it has left, and nothing is left in flight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hostile_exchange import HostileExchange
from layer_runs import CONFIG, TILE, H, by_reference, inputs, run_layer, together
from ranks import run_ranks
from torch import Tensor

from distmoe import MoE
from distmoe.config import DispatchConfig, RoundingConfig
from distmoe.kernels.testing import assert_as_good_as, poisoned_empty

TOKENS = [18, 21, 24, 27]
BASE = replace(CONFIG, rounding=RoundingConfig("balance", tile=TILE))
WAYS = [
    ("copies", "source", 3),
    ("copies", "tokens", 2),
    ("rank", "source", 1),
    ("rank", "source", 3),
    ("rank", "tokens", 3),
    ("node", "auto", 1),
    ("node", "auto", 3),
]


@pytest.fixture(scope="module")
def wanted() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In fp64 and in fp32."""
    x, dout = inputs(TOKENS, None)
    exact, same = (by_reference(BASE, x, dout, 4, t)[0] for t in (torch.float64, torch.float32))
    return exact, same


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("level", "order", "steps"), WAYS)
def test_every_way_keeps_to_the_contract_of_transfers(
    level: str,
    order: str,
    steps: int,
    overlap: bool,
    wanted: tuple[dict[str, Tensor], dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[HostileExchange] = []

    def hostile(*args: Any) -> HostileExchange:
        made.append(HostileExchange(*args))
        return made[-1]

    monkeypatch.setattr("distmoe.comm.threaded.ThreadedExchange", hostile)
    dispatch = DispatchConfig(level=level, order=order, steps=steps, overlap=overlap)
    x, dout = inputs(TOKENS, None)
    with poisoned_empty():
        results = run_ranks(run_layer, 4, replace(BASE, dispatch=dispatch), TOKENS, x, dout, 2)
    joined = together(results)
    for name, want in wanted[0].items():
        assert_as_good_as(joined[name], wanted[1][name], want.float(), name)
    assert len(made) == (16 if level == "node" else 4)
    assert [exchange.open for exchange in made] == [set()] * len(made)


def test_rows_of_one_rank_are_contiguous_too() -> None:
    """A gradient that is one number for all, as of a sum, has no memory of its own."""
    seen: list[Tensor] = []
    layer = MoE(CONFIG)
    dgrad = layer.mlp.dgrad
    layer.mlp.dgrad = lambda dy_RH, *a, **k: (seen.append(dy_RH), dgrad(dy_RH, *a, **k))[1]
    x = torch.randn(H, 24, generator=torch.Generator().manual_seed(0)).T
    layer(x.requires_grad_())[0].sum().backward()
    assert all(dy_RH.is_contiguous() for dy_RH in seen)
    assert len(seen) == 1
