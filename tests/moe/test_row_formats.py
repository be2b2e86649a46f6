"""Rows that travel in fewer bytes: what comes out does not depend on who computes it, or when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hostile_exchange import HostileExchange
from layer_runs import CONFIG, TILE, H, by_reference, inputs, make_layer, run_layer, together
from ranks import run_ranks
from torch import Tensor

from distmoe.config import DispatchConfig, MoEConfig, RoundingConfig
from distmoe.kernels.fp8_rows import packed_bytes
from distmoe.kernels.testing import assert_as_good_as, poisoned_empty
from distmoe.moe.row_formats import TravelFormats

# Ranks, ranks of a node, and how rows travel among them.
WAYS = {
    "one rank": (1, 0, DispatchConfig()),
    "by source": (2, 0, DispatchConfig(order="source")),
    "by tokens": (4, 0, DispatchConfig(order="tokens", steps=2)),
    "copies": (4, 0, DispatchConfig(level="copies", steps=2)),
    "over nodes": (4, 2, DispatchConfig(level="node", steps=2)),
}


@pytest.fixture(autouse=True)
def _hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distmoe.comm.threaded.ThreadedExchange", HostileExchange)


def tokens_of(num_ranks: int) -> list[int]:
    """Uneven, and the last rank has none."""
    return [24] if num_ranks == 1 else [*range(16, 12 + 4 * num_ranks, 4), 0]


def results_of(way: str, **changes: str | bool) -> tuple[MoEConfig, list[dict]]:
    num_ranks, ranks_per_node, dispatch = WAYS[way]
    tokens = tokens_of(num_ranks)
    dispatch = replace(dispatch, **changes)
    config = replace(CONFIG, rounding=RoundingConfig("balance", tile=TILE), dispatch=dispatch)
    x, dout = inputs(tokens, None)
    with poisoned_empty():
        results = run_ranks(run_layer, num_ranks, config, tokens, x, dout, ranks_per_node)
    return config, results


@pytest.mark.parametrize("row_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("way", WAYS)
def test_every_row_is_rounded_once(way: str, row_dtype: str) -> None:
    """Own rows and those of others, in the forward and the backward, by the reference that knows no
    ranks; a row that was not rounded would be off by far more."""
    config, results = results_of(way, row_dtype=row_dtype)
    num_ranks = WAYS[way][0]
    x, dout = inputs(tokens_of(num_ranks), None)
    exact, _ = by_reference(config, x, dout, num_ranks, torch.float64)
    same_dtype, _ = by_reference(config, x, dout, num_ranks, torch.float32)
    joined = together(results)
    for name, want in exact.items():
        assert_as_good_as(joined[name], same_dtype[name], want.float(), name)


@pytest.mark.parametrize("way", ["by tokens", "over nodes"])
def test_overlap_changes_no_bit(way: str) -> None:
    formats = {"row_dtype": "fp8", "sum_dtype": "bf16"}
    first, second = (
        together(results_of(way, overlap=overlap, **formats)[1]) for overlap in (True, False)
    )
    for name, values in first.items():
        assert torch.equal(values, second[name]), name


def test_sums_are_rounded_where_nothing_travels_too() -> None:
    """On one rank a partial sum is all of it: rounded, and nothing else."""
    plain, narrow = (together(results_of("one rank", sum_dtype=d)[1]) for d in ("computed", "bf16"))
    assert torch.equal(narrow["out"], plain["out"].bfloat16().float())
    for name in ("d_router", "dw_in", "dw_out"):
        assert torch.equal(narrow[name], plain[name]), name
    assert not torch.equal(narrow["dx"], plain["dx"])


@pytest.mark.parametrize("way", ["by source", "copies", "over nodes"])
def test_partial_sums_err_by_bf16(way: str) -> None:
    """Each is rounded to bf16, over nodes with the sum of the node's: 2^-8 of it at the most, and
    they are no larger than the sum of all magnitudes."""
    plain, narrow = (together(results_of(way, sum_dtype=d)[1]) for d in ("computed", "bf16"))
    for name in ("out", "dx"):
        error = (narrow[name] - plain[name]).abs().max() / plain[name].abs().max()
        assert 2**-12 < error < 2**-6, name
    for name in ("d_router", "dw_in", "dw_out"):
        assert torch.equal(narrow[name], plain[name]), name


@pytest.mark.parametrize(
    ("row_dtype", "sum_dtype", "there", "home"),
    [
        ("computed", "computed", 4 * H, 4 * H),
        ("bf16", "computed", 2 * H, 4 * H),
        ("fp8", "bf16", packed_bytes(H), 2 * H),
    ],
)
def test_bytes(row_dtype: str, sum_dtype: str, there: int, home: int) -> None:
    """To the byte, forward and backward."""
    _, results = results_of("by tokens", row_dtype=row_dtype, sum_dtype=sum_dtype)
    sent = [result["rows_sent"] for result in results]
    # A rank sends home what the others have sent it.
    assert sum(result["traffic"].get("rows", 0) for result in results) == 2 * sum(sent) * (
        there + home
    )
    assert results[-1]["rows_sent"] == 0
    assert min(sent[:-1]) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_arrives(bad: float) -> None:
    """A gradient, as x would reach the weights of its pairs by the router, too."""

    def run(rank: int) -> Tensor:
        dispatch = DispatchConfig(row_dtype="fp8", sum_dtype="bf16")
        config = replace(CONFIG, rounding=RoundingConfig("none", tile=TILE), dispatch=dispatch)
        layer = make_layer(config, rank, 2)
        x_TH = inputs([24, 24], None)[0][24 * rank : 24 * rank + 24].clone().requires_grad_()
        dout_TH = torch.ones_like(x_TH)
        dout_TH[5, 3] = bad
        layer(x_TH)[0].backward(dout_TH)
        assert x_TH.grad is not None
        return x_TH.grad

    for dx_TH in run_ranks(run, 2):
        assert dx_TH[5].isnan().any()
        assert dx_TH[:5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bf16_is_nothing_new_where_rows_are_as_short(dtype: torch.dtype) -> None:
    x_TH = torch.randn(4, H).to(dtype)
    packed = TravelFormats.of(DispatchConfig(row_dtype="bf16", sum_dtype="bf16")).pack(x_TH)
    assert packed.is_plain
    assert packed.unpacked().data_ptr() == x_TH.data_ptr()
    assert packed.new_sums(3).dtype == dtype


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("row_dtype", "fp4", "row_dtype is 'fp4'; it must be one of computed, bf16, fp8"),
        ("sum_dtype", "fp8", "sum_dtype is 'fp8'; it must be one of computed, bf16"),
    ],
)
def test_other_formats_are_refused(key: str, value: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"dispatch.{words}"):
        make_layer(replace(CONFIG, dispatch=DispatchConfig(**{key: value})))
