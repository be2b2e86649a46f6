"""Traces: written, joined, refused, and what a simulation makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from distmoe import MoE, MoEConfig
from distmoe.bench.routing_simulation import (
    TOP_K,
    Setting,
    simulate,
    synthetic_scores,
    traced_scores,
)
from distmoe.config import (
    Config,
    ExpertGroups,
    ModelConfig,
    ParallelConfig,
    RankInfo,
    RoundingConfig,
    RunConfig,
    TrainConfig,
)
from distmoe.kernels.round_select import NOTHING
from distmoe.kernels.router_topk.torch_backend import integer_keys
from distmoe.metrics.routing_trace import (
    RankTrace,
    TraceError,
    TraceFacts,
    forget_traces,
    read_rank_trace,
    read_traces,
    trace_folder,
    trace_path,
    write_trace,
)
from distmoe.routing.group_limit import GroupLimit
from distmoe.routing.routers import Scores
from distmoe.train.record_routing import RoutingRecorder

H, E, K, M, T = 16, 8, 2, 8, 24
LAYERS, MICRO_BATCHES = 2, 3
RULES = ["nearest", "balance", "up", "down"]


def made(rank: int, *, step: int = 7, world: int = 4, ep: int = 2, tokens: int = 5) -> RankTrace:
    """Two layers and three micro-batches of one rank, whose keys tell where they belong."""
    generator = np.random.default_rng(100 * step + rank)
    key_LMTE = generator.integers(0, 1 << 24, (LAYERS, MICRO_BATCHES, tokens, E), dtype=np.int32)
    facts = TraceFacts(step, rank, world, ep, top_k=K, tile=M, layers=(1, 3))
    return RankTrace(facts, key_LMTE, key_LMTE)


def write_all(folder: Path, *, steps: tuple[int, ...] = (7,), world: int = 4) -> None:
    folder.mkdir(exist_ok=True)
    for step in steps:
        for rank in range(world):
            write_trace(folder, made(rank, step=step, world=world))


def test_round_trip_joins_ranks_in_order(tmp_path: Path) -> None:
    write_all(tmp_path, steps=(12, 7))
    groups = list(read_traces(tmp_path))
    assert len(groups) == 2 * 2 * LAYERS * MICRO_BATCHES
    where = [(g.step, g.group, g.layer, g.micro_batch) for g in groups]
    assert where == sorted(where)
    assert {(g.top_k, g.tile, g.ranks) for g in groups} == {(K, M, 2)}
    for group in groups:
        parts = [
            made(rank, step=group.step).key_LMTE[(1, 3).index(group.layer), group.micro_batch]
            for rank in (2 * group.group, 2 * group.group + 1)
        ]
        assert np.array_equal(group.key_TE, np.concatenate(parts))
        assert np.array_equal(group.mass_TE, group.key_TE)


def test_scores_are_written_only_where_a_bias_makes_them_differ(tmp_path: Path) -> None:
    plain = made(0, world=1, ep=1)
    biased = replace(plain, key_LMTE=plain.key_LMTE - 5)
    for trace, names in ((plain, {"key"}), (biased, {"key", "mass"})):
        write_trace(tmp_path, trace)
        with np.load(trace_path(tmp_path, 7, 0)) as file:
            assert {"key", "mass"} & set(file.files) == names
        read = read_rank_trace(tmp_path, 7, 0)
        assert read.facts == trace.facts
        assert np.array_equal(read.key_LMTE, trace.key_LMTE)
        assert np.array_equal(read.mass_LMTE, trace.mass_LMTE)
        assert read.key_LMTE.dtype == read.mass_LMTE.dtype == np.int32


def test_a_kill_while_writing_leaves_no_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(file, **arrays) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_trace(tmp_path, made(0))
    assert not trace_path(tmp_path, 7, 0).exists()
    with pytest.raises(TraceError, match="no routing trace"):
        trace_folder(tmp_path)


def test_the_folder_of_a_run_or_of_its_traces(tmp_path: Path) -> None:
    write_all(tmp_path / "routing")
    assert trace_folder(tmp_path) == trace_folder(tmp_path / "routing") == tmp_path / "routing"
    with pytest.raises(TraceError, match=f"{tmp_path}/nowhere has no routing trace"):
        trace_folder(tmp_path / "nowhere")


def problem(folder: Path) -> str:
    with pytest.raises(TraceError) as caught:
        list(read_traces(folder))
    return str(caught.value)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_missing_rank_is_named(tmp_path: Path, rank: int) -> None:
    write_all(tmp_path)
    trace_path(tmp_path, 7, rank).unlink()
    assert problem(tmp_path).startswith(f"{trace_path(tmp_path, 7, rank)} is missing: rank ")


def test_a_rank_of_a_larger_run_is_named(tmp_path: Path) -> None:
    write_all(tmp_path, world=2)
    write_trace(tmp_path, made(2, world=4))
    assert problem(tmp_path).startswith(f"{trace_path(tmp_path, 7, 2)} is too many: rank 0 of step")


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04 half of a zip file"])
def test_a_file_that_is_no_trace_is_named(tmp_path: Path, content: bytes) -> None:
    write_all(tmp_path)
    trace_path(tmp_path, 7, 1).write_bytes(content)
    assert problem(tmp_path).startswith(f"{trace_path(tmp_path, 7, 1)} is not a routing trace: ")


def test_half_a_file_is_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = trace_path(tmp_path, 7, 3)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert problem(tmp_path).startswith(f"{path} is not a routing trace: ")


def test_other_arrays_and_versions_are_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = trace_path(tmp_path, 7, 0)
    with np.load(path) as file:
        values = dict(file)
    np.savez(path, **{name: values[name] for name in values if name not in ("key", "tile")})
    assert problem(tmp_path) == f"{path} is not a routing trace: no key, tile"
    np.savez(path, **{**values, "version": np.asarray(2)})
    assert problem(tmp_path) == f"{path} has format 2; known: 1"
    np.savez(path, **{**values, "key": values["key"].astype(np.int64)})
    assert problem(tmp_path) == f"{path} has keys of type int64, not int32"
    np.savez(path, **{**values, "rank": np.asarray(1)})
    assert problem(tmp_path) == f"{path} is of step 7, rank 1"


def test_ranks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = trace_path(tmp_path, 7, 3)
    write_trace(tmp_path, made(3, tokens=6))
    assert problem(tmp_path).startswith(f"{path}: keys are [2, 3, 6, 8] [layers, micro-batches, T")
    other = made(3)
    write_trace(tmp_path, replace(other, facts=replace(other.facts, tile=16)))
    assert problem(tmp_path) == f"{path}: tile is 16; rank 0 has 8"


def test_steps_that_are_made_again_are_forgotten(tmp_path: Path) -> None:
    write_all(tmp_path, steps=(3, 4, 5))
    (tmp_path / "step-00000005-rank-0000.npz.part").touch()
    (tmp_path / "step-notes.txt").touch()
    forget_traces(tmp_path, after_step=4)
    assert sorted({g.step for g in read_traces(tmp_path)}) == [3, 4]
    left = sorted(path.name for path in tmp_path.iterdir() if path.name[5:13] > "00000004")
    assert left == ["step-notes.txt"]


def config_of(folder: Path, ep: int) -> Config:
    return Config(
        run=RunConfig(dir=str(folder)),
        model=ModelConfig(hidden_size=H, n_layers=LAYERS + 1, n_dense_layers=1),
        moe=MoEConfig(
            hidden_size=H,
            intermediate_size=8,
            num_experts=E,
            top_k=K,
            rounding=RoundingConfig("balance", tile=M),
        ),
        parallel=ParallelConfig(ep=ep),
        train=TrainConfig(record_routing=2),
    )


def record_steps(rank: int, config: Config, x_PSMLTH: Tensor) -> list[list[tuple[int, int]]]:
    """Steps of one rank, the evaluation of each among them; the pairs of every training forward."""
    ep = config.parallel.ep
    layers = [MoE(config.moe, dist.group.WORLD if ep > 1 else None) for _ in range(LAYERS)]
    for row, layer in enumerate(layers):
        weight = torch.randn(E, H, generator=torch.Generator().manual_seed(row))
        layer.router_EH.data.copy_(weight)
    recorder = RoutingRecorder.open(config, RankInfo(rank=rank, world=ep), layers, resumed_step=0)
    pairs = []
    for step in range(len(x_PSMLTH[rank])):
        with recorder.recording():
            for x_LTH in x_PSMLTH[rank, step]:
                pairs += [pairs_of(layer, x_TH) for layer, x_TH in zip(layers, x_LTH, strict=True)]
        assert all(layer.on_scores is None for layer in layers)
        if recorder.steps_left:
            recorder.write(step + 1)
        for layer in layers:
            layer.eval()(x_PSMLTH[rank, step, 0, 0])
            layer.train()
    return pairs


def pairs_of(layer: MoE, x_TH: Tensor) -> list[tuple[int, int]]:
    """The (expert, token) pairs that a forward runs."""
    decided = []
    decide = layer._decide
    layer._decide = lambda *given: decided.append(decide(*given)) or decided[-1]
    layer(x_TH)
    del layer._decide
    routing = decided[0].routing.trimmed()
    return list(zip(routing.expert_N.tolist(), routing.token_N.tolist(), strict=True))


@pytest.mark.parametrize(("ep", "groups_per_token"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_joined_ranks_are_what_the_run_chose(
    tmp_path: Path, ep: int, groups_per_token: int
) -> None:
    """Rounded again from the trace, every layer and micro-batch gives the pairs that really ran."""
    from distmoe.comm import make_exchange
    from distmoe.routing.round_tokens import round_scores

    shape = (ep, 3, MICRO_BATCHES, LAYERS, T, H)
    x_PSMLTH = torch.randn(shape, generator=torch.Generator().manual_seed(ep))
    config = config_of(tmp_path, ep)
    if groups_per_token:
        limited = replace(config.moe, expert_groups=4, groups_per_token=groups_per_token)
        config = replace(config, moe=limited)
    ran = run_ranks(record_steps, ep, config, x_PSMLTH)
    groups = list(read_traces(tmp_path))
    # Of three steps two are recorded, and no evaluation.
    assert [g.step for g in groups] == [1] * (LAYERS * MICRO_BATCHES) + [2] * (
        LAYERS * MICRO_BATCHES
    )
    moved = 0
    for group in groups:
        n = ((group.step - 1) * MICRO_BATCHES + group.micro_batch) * LAYERS + group.layer - 1
        really = [(expert, token + T * r) for r in range(ep) for expert, token in ran[r][n]]
        scores = traced_scores(group)
        assert (scores.allowed_TE is not None) is bool(groups_per_token)
        rounding = RoundingConfig("balance", tile=M, balance_groups=ep)
        rounded = round_scores(scores, make_exchange(None), rounding)
        assert [tuple(pair) for pair in rounded.selected_TE.T.nonzero().tolist()] == sorted(really)
        moved += int((rounded.selected_TE != scores.chosen_TE).sum())
    assert moved > 0


def test_a_recomputed_forward_is_recorded_once(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    from distmoe.moe.routing_tape import RoutingTape

    config = config_of(tmp_path, 1)
    layers = [MoE(config.moe) for _ in range(LAYERS)]
    recorder = RoutingRecorder.open(config, RankInfo(), layers, resumed_step=0)
    with recorder.recording():
        x_TH = torch.randn(T, H, requires_grad=True)
        for layer in layers:
            context = RoutingTape.contexts
            x_TH, _ = checkpoint(layer, x_TH, use_reentrant=False, context_fn=context)
        x_TH.sum().backward()
    recorder.write(1)
    assert read_rank_trace(tmp_path / "routing", 1, 0).key_LMTE.shape == (LAYERS, 1, T, E)


def test_off_is_nothing(tmp_path: Path) -> None:
    config = replace(config_of(tmp_path, 1), train=TrainConfig(record_routing=0))
    layers = [MoE(config.moe)]
    recorder = RoutingRecorder.open(config, RankInfo(), layers, resumed_step=0)
    with recorder.recording():
        assert layers[0].on_scores is None
    assert recorder.steps_left == 0
    assert list(tmp_path.iterdir()) == []


def test_a_choice_that_is_no_top_k_of_the_keys_is_refused(tmp_path: Path) -> None:
    """As of a router that does not decide on its keys: its trace would be simulated wrongly."""
    layers = [MoE(config_of(tmp_path, 1).moe)]
    recorder = RoutingRecorder.open(config_of(tmp_path, 1), RankInfo(), layers, resumed_step=0)
    router = layers[0].router

    def limited(logits_TE: Tensor, bias_E: Tensor | None = None) -> Scores:
        scores = router(logits_TE, bias_E)
        return replace(scores, chosen_TE=scores.chosen_TE.roll(1, dims=1))

    layers[0].router = limited
    with recorder.recording(), pytest.raises(ValueError, match="does not choose the top-k of its"):
        layers[0](torch.randn(T, H))


def test_simulating_a_trace_is_simulating_its_scores(tmp_path: Path) -> None:
    setting = Setting(tokens=64, num_experts=E, top_k=K, ranks=2, tile=M, skew=0.5)
    scores = synthetic_scores(setting)
    facts = TraceFacts(1, 0, 2, 2, top_k=K, tile=M, layers=(0,))
    for rank, key_TE in enumerate(scores.key_TE.chunk(2)):
        key_LMTE = key_TE.numpy()[None, None]
        write_trace(tmp_path, RankTrace(replace(facts, rank=rank), key_LMTE, key_LMTE))
    (group,) = read_traces(tmp_path)
    again = simulate(traced_scores(group), RULES, ranks=2, tile=M)
    assert again == simulate(scores, RULES, ranks=2, tile=M)


def test_simulating_a_trace_keeps_to_the_groups_of_a_token(tmp_path: Path) -> None:
    """An expert whose tokens are all chosen cannot round up, and no way takes another token."""
    score_TE = synthetic_scores(Setting(tokens=30, num_experts=E, top_k=K, ranks=2, tile=M))
    scores = GroupLimit(ExpertGroups(4, 1), top_k=K, group_score="max")(score_TE)
    facts = TraceFacts(1, 0, 2, 2, top_k=K, tile=M, layers=(0,))
    masses = integer_keys(scores.score_TE).chunk(2)
    for rank, (key_TE, mass_TE) in enumerate(zip(scores.key_TE.chunk(2), masses, strict=True)):
        trace = RankTrace(
            replace(facts, rank=rank), key_TE.numpy()[None, None], mass_TE.numpy()[None, None]
        )
        write_trace(tmp_path, trace)
    (group,) = read_traces(tmp_path)
    again = traced_scores(group)
    assert torch.equal(again.chosen_TE, scores.chosen_TE)
    assert torch.equal(again.allowed_TE, scores.allowed_TE)
    outcomes = simulate(again, RULES, ranks=2, tile=M)
    # One group of two experts for two choices: all that is allowed is chosen, nothing can be added.
    assert {outcome.added for outcome in outcomes} == {0}
    assert {outcome.name for outcome in outcomes if outcome.waste} == {TOP_K}


def test_the_bias_of_a_trace_is_found_again(tmp_path: Path) -> None:
    scores = synthetic_scores(Setting(tokens=30, num_experts=E, top_k=K, ranks=2, tile=M))
    bias_E = torch.arange(E, dtype=torch.int32) << 20
    facts = TraceFacts(1, 0, 1, 1, top_k=K, tile=M, layers=(0,))
    drawn_TE = torch.randint(0, 1 << 24, scores.key_TE.shape, dtype=torch.int32)
    # Unbiased, biased, and of a forced router.
    keys = scores.key_TE, scores.key_TE + bias_E, drawn_TE
    for key_TE, want_E in zip(keys, (None, bias_E, None), strict=True):
        limit = GroupLimit(ExpertGroups(4, 2), top_k=K, group_score="max")
        limited_TE = torch.where(limit.allowed(key_TE), key_TE, NOTHING)
        for kept_TE in (key_TE, limited_TE):
            key_LMTE, mass_LMTE = kept_TE.numpy()[None, None], scores.key_TE.numpy()[None, None]
            write_trace(tmp_path, RankTrace(facts, key_LMTE, mass_LMTE))
            (group,) = read_traces(tmp_path)
            found_E = traced_scores(group).bias_E
            assert found_E is None if want_E is None else torch.equal(found_E, want_E)
