"""What the settings of a layer do, and which are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layer_runs import CONFIG, DEVICE, TILE, H, inputs, make_layer, weights
from ranks import run_ranks
from tile_tables import table_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from distmoe import MoE
from distmoe.config import DispatchConfig, RoundingConfig
from distmoe.kernels.moe_mlp import MoeMlp, Runs, check_operands
from distmoe.kernels.moe_mlp.torch_backend import TorchMoeMlp
from distmoe.kernels.moe_mlp.triton_backend import TritonMoeMlp
from distmoe.kernels.testing import poisoned_empty
from distmoe.moe.routing_tape import RoutingTape


def test_evaluation_is_plain_top_k() -> None:
    layer = MoE(replace(CONFIG, rounding=RoundingConfig("nearest", tile=TILE)))
    x = torch.randn(40, H, generator=torch.Generator().manual_seed(3))
    layer.train()(x)
    assert int(layer.stats.dropped + layer.stats.added) > 0
    layer.eval()(x)
    assert int(layer.stats.dropped + layer.stats.added) == 0
    assert torch.equal(layer.stats.freq_E, layer.stats.target_E)


def test_any_shape_and_a_shared_expert() -> None:
    layer = MoE(replace(CONFIG, shared_intermediate_size=12, rounding=RoundingConfig("none")))
    x = torch.randn(2, 5, H, generator=torch.Generator().manual_seed(4))
    out, losses = layer(x)
    assert out.shape == x.shape
    assert torch.equal(out.view(-1, H), layer(x.view(-1, H))[0])
    without = layer.experts.w_out_eHI.data.zero_()
    assert torch.equal(layer(x)[0], layer.shared(x.view(-1, H)).view(x.shape)), without.shape
    assert losses.load_balance.ndim == 0


def test_kernels_take_the_table_of_the_layer(tmp_path: Path) -> None:
    table = str(table_file(tmp_path / "tiles.toml"))
    for kernel_tiles, entries in ((table, 1), ("default", 0)):
        layer = MoE(replace(CONFIG, kernel="triton", kernel_tiles=kernel_tiles))
        assert isinstance(layer.mlp, TritonMoeMlp)
        assert len(layer.mlp.tiles) == entries


def test_impossible_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k is 9; it must be in 1\.\.num_experts \(8\)"):
        MoE(replace(CONFIG, top_k=9))
    with pytest.raises(ValueError, match="renormalize is none; it must be topk with router"):
        MoE(replace(CONFIG, router="topk_softmax", renormalize="none"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_scale": 0.0}, "score_scale is 0.0; it must be greater than 0"),
        ({"bias_update_rate": -0.1}, r"bias_update_rate is -0.1; it must be in \[0, 1\]"),
        ({"bias_update_rate": 1e-9}, "bias_update_rate is 1e-09; it must be 0 or at least 5.96"),
        (
            {"rounding": RoundingConfig(capacity_factor=0.5)},
            "rounding.capacity_factor is 0.5; it must be 0 for no bound, or at least 1",
        ),
        ({"load_balance_scope": "node"}, "load_balance_scope is 'node'; it must be one of global,"),
        ({"group_score": "mean"}, "group_score is 'mean'; it must be one of max, top2, sum"),
        ({"expert_groups": 3}, "^expert_groups is 3; it must be 0, 1 or divide num_experts"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        (
            {"rounding": RoundingConfig(balance_groups=3)},
            "balance_groups is 3; it must be 0 or div",
        ),
        (
            {"router": "balanced", "bias_update_rate": 0.001},
            "^bias_update_rate is 0.001; it must be 0 with router 'balanced'",
        ),
    ],
)
def test_impossible_settings_are_refused_without_a_config_file(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MoE(replace(CONFIG, **changes))


def test_settings_that_do_not_fit_the_ranks_are_refused() -> None:
    def build(rank: int, changes: dict[str, object]) -> None:
        MoE(replace(CONFIG, **changes), dist.group.WORLD)

    local = {"dispatch": DispatchConfig(exchange="local")}
    message = r"exchange is local; it must be auto or one of p2p.*with ep \(2\)"
    with pytest.raises(RuntimeError, match=message):
        run_ranks(build, 2, local)
    MoE(replace(CONFIG, **local))
    with pytest.raises(RuntimeError, match=r"num_experts is 8; it must be a multiple of ep \(3\)"):
        run_ranks(build, 3, {})


def test_nodes_of_the_ep_group_limit_the_choice() -> None:
    config = replace(CONFIG, nodes_per_token=1, top_k=2, rounding=RoundingConfig("none"))

    def run(rank: int, ranks_per_node: int) -> Tensor:
        layer = MoE(config, dist.group.WORLD, ranks_per_node=ranks_per_node)
        with torch.no_grad():
            layer.router_EH.copy_(weights()["router"])
        layer(x[rank * 20 : (rank + 1) * 20])
        logits_TE = x[rank * 20 : (rank + 1) * 20] @ weights()["router"].T
        return layer._score(logits_TE).chosen_TE

    x = torch.randn(80, H, generator=torch.Generator().manual_seed(5))
    limited_TE = torch.cat(run_ranks(run, 4, 2))
    # Two nodes of two ranks, four experts each.
    assert int(limited_TE.view(80, 2, 4).any(2).sum(1).max()) == 1
    assert limited_TE.sum(1).tolist() == [2] * 80
    free_TE = torch.cat(run_ranks(run, 4, 4))
    assert int(free_TE.view(80, 2, 4).any(2).sum(1).max()) == 2
    with pytest.raises(RuntimeError, match="ranks_per_node is 0; it must be at least 1"):
        run_ranks(run, 4, 0)


def test_scale_multiplies_what_the_experts_give() -> None:
    torch.manual_seed(0)
    layer = MoE(replace(CONFIG, rounding=RoundingConfig("none")))
    x = torch.randn(10, H)
    plain = layer(x)[0]
    layer.config = replace(layer.config, score_scale=2.0)
    assert torch.equal(layer(x)[0], 2 * plain)


def step(layer: MoE, x: Tensor, *, autocast: bool) -> tuple[Tensor, list[Tensor]]:
    """Of one forward and backward: the output, and every gradient as fp32."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, losses = layer(x)
    (out.float().square().mean() + losses.load_balance + losses.z).backward()
    return out, [x.grad.float(), *(parameter.grad.float() for parameter in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32 rows", "bf16 rows"])
def test_autocast_is_a_layer_of_its_dtype(dtype: torch.dtype) -> None:
    """Bit for bit; as behind a Linear, which under autocast gives bf16, or behind none."""
    layer = MoE(replace(CONFIG, shared_intermediate_size=12, rounding=RoundingConfig(tile=TILE)))
    same = MoE(layer.config)
    same.load_state_dict(layer.state_dict())
    x = torch.randn(40, H, generator=torch.Generator().manual_seed(6)).bfloat16()
    out, gradients = step(layer, x.to(dtype), autocast=True)
    want, want_gradients = step(same.bfloat16(), x, autocast=False)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
    for gradient, wanted in zip(gradients, want_gradients, strict=True):
        assert torch.equal(gradient, wanted)


def test_operands_that_do_not_fit_are_refused() -> None:
    layer = MoE(CONFIG)
    with pytest.raises(ValueError, match=r"x has the shape \(4, 17\).*hidden_size \(16\)"):
        layer(torch.randn(4, 17))
    with pytest.raises(ValueError, match=r"x has the shape \(\).*hidden_size \(16\)"):
        layer(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"rows are torch.bfloat16, w_in torch.float32.*one dtype"):
        check_operands(torch.empty(2, 2).bfloat16(), torch.empty(1, 4, 2), torch.empty(1, 2, 2))
    with pytest.raises(ValueError, match=r"rows are 3 wide, w_in is \(1, 4, 2\)"):
        check_operands(torch.empty(2, 3), torch.empty(1, 4, 2), torch.empty(1, 3, 2))


def test_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="x is on meta and router_EH on .*; they must be on one"):
        make_layer(CONFIG).to(DEVICE)(torch.empty(4, H, device="meta"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match=r"x is on cuda:0, .* current device is cuda:1; .*\(0\)"),
    ):
        make_layer(CONFIG)(torch.empty(4, H, device="cuda:0"))


def test_a_group_of_others_is_refused() -> None:
    def run(rank: int) -> None:
        others = dist.new_group([1 - rank])
        with pytest.raises(ValueError, match="ep_group is a group without this rank; it must be"):
            MoE(CONFIG, others)
        with pytest.raises(ValueError, match="loss_group is 'dp'; it must be None or a Proc"):
            MoE(CONFIG, loss_group="dp")
        with pytest.raises(ValueError, match="cp_group is a group without this rank; it must be"):
            MoE(CONFIG, cp_group=others)

    run_ranks(run, 2)


def test_a_moved_layer_picks_its_kernels_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MoE(CONFIG)
    assert isinstance(layer.mlp, TorchMoeMlp)
    monkeypatch.setattr("distmoe.moe.layer.backend_for", lambda name, device: "triton")
    assert isinstance(layer.mlp, TorchMoeMlp)
    assert isinstance(layer.to(DEVICE).mlp, TritonMoeMlp)


@pytest.mark.parametrize("other", ["x", "experts", "shared"])
def test_another_dtype_is_refused_before_anything_is_sent(other: str) -> None:
    """Peers that got a message would wait for the next."""
    x = torch.randn(40, H, generator=torch.Generator().manual_seed(7))

    def run(rank: int) -> list[str]:
        layer = MoE(replace(CONFIG, shared_intermediate_size=12), dist.group.WORLD)
        sent: list[str] = []
        for name in ("all_gather", "all_reduce", "post_recv", "post_send"):
            posted = getattr(layer.exchange, name)
            setattr(layer.exchange, name, lambda *a, f=posted, **k: sent.append("") or f(*a, **k))
        layer(x)
        assert sent
        sent.clear()
        if other != "x":
            getattr(layer, other).bfloat16()
        with pytest.raises(ValueError, match=r"x is torch\.\w+ and \w+\.\w+.* torch\..* one dtype"):
            layer(x.bfloat16() if other == "x" else x)
        return sent

    assert run_ranks(run, 2) == [[], []]


class Watched:
    """A backend that notes the pairs of its calls."""

    def __init__(self, mlp: MoeMlp) -> None:
        self.mlp, self.row_sum = mlp, mlp.row_sum
        self.forwards: list[int] = []
        self.dgrads: list[int] = []
        self.wgrads = 0

    def forward(self, *tensors: Tensor, runs: Runs, **rest: Any) -> None:
        self.forwards.append(runs.max_pairs)
        self.mlp.forward(*tensors, runs=runs, **rest)

    def dgrad(self, *tensors: Tensor, runs: Runs, **rest: Any) -> None:
        self.dgrads.append(runs.max_pairs)
        self.mlp.dgrad(*tensors, runs=runs, **rest)

    def wgrad(self, *tensors: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        self.wgrads += 1
        return self.mlp.wgrad(*tensors, **rest)


def test_frozen_experts_cost_no_weight_gradients() -> None:
    layer = MoE(CONFIG)
    layer._mlp = watched = Watched(layer.mlp)
    layer.experts.requires_grad_(False)
    x, dout = inputs([24], None)
    layer(x)[0].backward(dout)
    assert (len(watched.dgrads), watched.wgrads) == (1, 0)
    layer.experts.requires_grad_()
    layer(x)[0].backward(dout)
    assert (len(watched.dgrads), watched.wgrads) == (2, 1)


def test_anomaly_detection_finds_nothing_behind_the_last_pair() -> None:
    layer = MoE(replace(CONFIG, rounding=RoundingConfig("down", tile=TILE)))
    x, dout = inputs([30], None)
    with poisoned_empty(), torch.autograd.set_detect_anomaly(True):
        layer(x.requires_grad_())[0].backward(dout)
    assert int(layer.stats.dropped) > 0


@pytest.mark.parametrize("changed", ["overlap", "recompute"])
def test_calls_keep_their_pairs(changed: str) -> None:
    """Pairs of a call pick its tiles, and these the order of the sums of dscore: neither overlap
    nor a forward that runs again may change them."""
    x, dout = inputs([24, 30], None)

    def calls(rank: int, overlap: bool, recompute: bool) -> tuple[list[int], list[int]]:
        rounding, dispatch = RoundingConfig("balance", tile=TILE), DispatchConfig(overlap=overlap)
        layer = make_layer(replace(CONFIG, rounding=rounding, dispatch=dispatch), rank, 2)
        layer._mlp = watched = Watched(layer.mlp)
        rows = slice(0, 24) if rank == 0 else slice(24, 54)
        own = x[rows].clone().requires_grad_()
        if recompute:
            contexts = RoutingTape.contexts
            out = checkpoint(lambda x: layer(x)[0], own, use_reentrant=False, context_fn=contexts)
        else:
            out = layer(own)[0]
        (out * dout[rows]).sum().backward()
        return watched.forwards, watched.dgrads

    plain = run_ranks(calls, 2, True, False)
    assert all(len(forwards) == len(dgrads) > 1 for forwards, dgrads in plain)
    again = run_ranks(calls, 2, changed != "overlap", changed == "recompute")
    times = 2 if changed == "recompute" else 1
    assert again == [(times * forwards, dgrads) for forwards, dgrads in plain]
