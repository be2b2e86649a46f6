"""The examples of docs/adding.md: each file, with its line in a table, does what the page says."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import test_moe_mlp
import torch
import torch.distributed as dist
from exchange_contract import exercise
from manifests import write_manifest
from pages import ROOT, blocks
from parity_runs import run
from ranks import run_ranks

from distmoe import MoE, MoEConfig, registry
from distmoe.comm import make_exchange
from distmoe.config import Config, RoundingConfig, apply_overrides, check
from distmoe.kernels.moe_mlp import Runs, load_backend
from distmoe.routing.round_tokens import round_tokens
from distmoe.routing.routers import make_router

FILE = re.compile(r"# (distmoe/[\w/]+)\.py\n")
LINE = re.compile(r'(\w+): "(\w+)": "([\w.]+):(\w+)",\n')
SETTINGS = {
    "ROUTERS": "moe.router",
    "ROUNDING_RULES": "moe.rounding.rule",
    "EXCHANGES": "moe.dispatch.exchange",
    "MOE_MLP_BACKENDS": "moe.kernel",
    "ENGINES": "parallel.engine",
}


@dataclass(frozen=True)
class Example:
    """A file of the page, and its line in a table."""

    table: str
    name: str
    module: str
    attribute: str
    code: str


def examples() -> Iterator[Example]:
    page = blocks(ROOT / "docs/adding.md", "python", "text")
    for file, line in zip(page[::2], page[1::2], strict=True):
        path, entry = FILE.match(file.text), LINE.fullmatch(line.text)
        assert path, f"line {file.line} has no path"
        assert entry, f"line {line.line} is no line of a table"
        example = Example(*entry.groups(), code=file.text)
        assert example.module == path[1].replace("/", ".")
        yield example


EXAMPLES = {example.table: example for example in examples()}


def test_there_is_an_example_of_each() -> None:
    assert set(EXAMPLES) == set(SETTINGS)


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Every example is a module that can be imported, with its line in its table."""
    for example in EXAMPLES.values():
        module = ModuleType(example.module)
        exec(compile(example.code, example.module, "exec"), vars(module))
        monkeypatch.setitem(sys.modules, example.module, module)
        table = getattr(registry, example.table)
        entry = f"{example.module}:{example.attribute}"
        monkeypatch.setitem(table._table, example.name, entry)


pytestmark = pytest.mark.usefixtures("add")


@pytest.mark.parametrize("table", SETTINGS)
def test_a_run_may_pick_it(table: str, tmp_path: Path) -> None:
    options = [
        "--data.path",
        write_manifest(tmp_path),
        f"--{SETTINGS[table]}",
        EXAMPLES[table].name,
    ]
    check(apply_overrides(Config(), options), 1)


def test_router() -> None:
    logits_TE = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    scores = make_router("sharp_topk", top_k=2, renormalize="topk")(logits_TE)
    assert torch.equal(scores.score_TE, (2 * logits_TE).softmax(1))
    rounding = RoundingConfig("nearest", tile=8)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 8, "top_k": 2}
    layer = MoE(MoEConfig(router="sharp_topk", rounding=rounding, **sizes))
    x_TH = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    layer(x_TH)[0].sum().backward()
    assert layer.router_EH.grad is not None
    assert (layer.stats.target_E % 8 == 0).all()


def test_rounding_rule() -> None:
    rule = registry.ROUNDING_RULES.load("half_up")
    counts_E = torch.tensor([4, 3, 5, 8])
    assert rule(counts_E, tile=8, room=9, groups=1).tolist() == [8, 0, 8, 8]
    scores_TE = torch.randn(64, 8, generator=torch.Generator().manual_seed(2)).softmax(1)
    alone = round_tokens(scores_TE, 2, tile=8, rule="half_up")

    def one(rank: int) -> torch.Tensor:
        own_TE = scores_TE[32 * rank : 32 * rank + 32]
        group = dist.group.WORLD
        return round_tokens(own_TE, 2, tile=8, rule="half_up", group=group).counts_E

    assert torch.equal(sum(run_ranks(one, 2)), alone.counts_E)
    assert (alone.counts_E % 8 == 0).all()


def test_exchange() -> None:
    run_ranks(lambda rank: exercise(make_exchange(dist.group.WORLD, "gather")), 3)


@pytest.mark.parametrize("case", test_moe_mlp.CASES)
def test_expert_kernels(case: str) -> None:
    problem = test_moe_mlp.make_problem(case)
    index = test_moe_mlp.index_of(problem, test_moe_mlp.CASES[case][0])
    test_moe_mlp.check(load_backend("accurate"), problem, index, [Runs.of_all(index)])


def test_engine() -> None:
    plain, single = (run(1, 1, 4, steps=3, engine=name)[0] for name in ("plain", "single"))
    assert np.array_equal(plain["losses"], single["losses"])
    assert np.array_equal(plain["norms"], single["norms"])
    assert set(plain["final"]) == set(single["final"])
