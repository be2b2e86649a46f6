"""Compiled dense parts: the parity law holds with them, and nobody else sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from parity_runs import CPU, LAW, assert_equal_runs, config_for, own_batches, train
from ranks import run_ranks
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from distmoe.config import Config, ConfigError, MlaConfig
from distmoe.config.keys import with_values
from distmoe.engines import make_engine, meta_model
from distmoe.mesh import build_mesh
from distmoe.train.step import train_step

STEPS = 3
# Attention, norms and loss; dense MLP and shared expert, where there are any.
FEW_GRAPHS, ALL_GRAPHS = 3, 5

WHOLE = config_for(1, 1, LAW[1, 1], engine="single")
# Whose graphs are compiled to machine code, which takes seconds for each.
SMALL = replace(
    WHOLE,
    model=replace(WHOLE.model, n_layers=2, n_dense_layers=0),
    moe=replace(WHOLE.moe, shared_intermediate_size=0),
)


def compiled(config: Config) -> Config:
    return replace(config, train=replace(config.train, compile="dense"))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    # Workers would import torch for a handful of small files.
    with inductor.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def test_parity_law() -> None:
    (oracle,) = run_ranks(train, 1, SMALL, 1, STEPS)
    (result,) = run_ranks(train, 1, compiled(SMALL), 1, STEPS)
    assert_equal_runs(result, oracle)
    # The two blocks share them.
    assert counters["stats"]["unique_graphs"] == FEW_GRAPHS


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    return run_ranks(train, 1, WHOLE, 1, STEPS)[0]


@pytest.mark.parametrize(
    ("engine", "ranks", "recompute"), [("single", 1, "selective"), ("fsdp2", 2, "full")]
)
def test_parity_law_of_graphs(
    engine: str,
    ranks: int,
    recompute: str,
    oracle: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same graphs, cut into forward and backward as for the compiler, without its code: with
    FSDP and checkpoints around them."""
    without_code = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr("distmoe.model.compile_dense.torch.compile", without_code)
    micro = LAW[ranks, ranks]
    config = config_for(ranks, ranks, micro, engine=engine, activation_checkpoint=recompute)
    for result in run_ranks(train, ranks, compiled(config), ranks, STEPS):
        assert_equal_runs(result, oracle)
    # All blocks of a rank share them.
    assert ALL_GRAPHS <= counters["stats"]["unique_graphs"] <= ranks * ALL_GRAPHS


def test_latent_attention_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is compiled is one graph, or compiling it fails."""
    monkeypatch.setattr(
        "distmoe.model.compile_dense.torch.compile", partial(torch.compile, backend="eager")
    )
    latent = {"model.attention": "mla", "model.head_dim": 10, "model.mla": MlaConfig(12, 20, 6, 4)}
    config = with_values(SMALL, latent)
    (oracle,), (result,) = (run_ranks(train, 1, c, 1, 1) for c in (config, compiled(config)))
    assert_equal_runs(result, oracle)
    assert counters["stats"]["unique_graphs"] == FEW_GRAPHS


def test_state_moves_between_compiled_and_not() -> None:
    def losses(config: Config, state: dict[str, Any]) -> list[float]:
        engine = make_engine(config, None, CPU)
        engine.load_state_dict(state)
        options: dict[str, Any] = {"lr": 1e-3, "moe": config.moe, "device": CPU, "group": None}
        batches = own_batches(0, 0, 1, config.train.micro_batch_size)
        return [train_step(engine, batches, **options).loss for _ in range(2)]

    first, second = (make_engine(c, None, CPU).state_dict() for c in (SMALL, compiled(SMALL)))
    assert first["model"].keys() == second["model"].keys()
    assert first["optimizer"].keys() == second["optimizer"].keys()
    assert losses(compiled(SMALL), first) == pytest.approx(losses(SMALL, second), rel=1e-5)


@pytest.mark.parametrize("cp", [1, 2])
def test_attention_that_waits_for_other_ranks_is_left_as_it_is(cp: int) -> None:
    def compiled_parts(rank: int) -> list[bool]:
        config = compiled(config_for(2, 1, LAW[2, 1], cp=cp))
        mesh = build_mesh(config.parallel, device_type="cpu")
        first = meta_model(config, CPU, mesh).blocks[0]
        return [name in vars(first) for name in ("attend", "dense")]

    assert run_ranks(compiled_parts, 2) == [[cp == 1, True]] * 2


def test_no_compiler_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match="train.compile is dense; it must be none on a CPU with"):
        make_engine(compiled(SMALL), None, CPU)
