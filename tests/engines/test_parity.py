"""The parity law: the same losses, decisions and gradients however the batch and the model are cut.

Rounding is over the tokens of an ep group, so each line of the table keeps that population at four
sequences: (1, 1) and (2, 2) take two micro-batches where (2, 1) and (4, 2) have two groups.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from distmoe.comm import Exchange
from distmoe.comm.context import ContextPart
from distmoe.config import (
    Config,
    DataConfig,
    DeepSpeedConfig,
    MlaConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RoundingConfig,
    TrainConfig,
)
from distmoe.config.keys import with_values
from distmoe.data.batches import Batch, mask_documents, rank_positions
from distmoe.engines import Engine, make_engine
from distmoe.mesh import build_mesh
from distmoe.moe import layer as layer_room
from distmoe.routing.round_tokens import Rounded
from distmoe.routing.routers import Scores
from distmoe.train.step import train_step

V, S, GLOBAL_BATCH = 64, 16, 8
# Of the law, and of each way to break it that is tried beside.
STEPS, FEW_STEPS = 10, 4
# Ends a document, where these are told apart.
END = 0
CPU = torch.device("cpu")
TOKENS = torch.randint(
    0, V, (STEPS, GLOBAL_BATCH, S + 1), generator=torch.Generator().manual_seed(7)
)

# (world, ep) -> sequences of a micro-batch, for a population of four.
LAW = {(1, 1): 4, (2, 1): 4, (2, 2): 2, (4, 2): 2, (4, 4): 1}


def config_for(world: int, ep: int, micro: int, **changes: Any) -> Config:
    moe = MoEConfig(
        hidden_size=32,
        intermediate_size=16,
        num_experts=8,
        top_k=2,
        shared_intermediate_size=8,
        load_balance_scope="ep",
        rounding=RoundingConfig("balance", tile=8, balance_groups=4),
    )
    config = Config(
        model=ModelConfig(
            vocab_size=V,
            hidden_size=32,
            n_layers=3,
            n_dense_layers=1,
            n_heads=4,
            n_kv_heads=2,
            head_dim=8,
            intermediate_size=48,
        ),
        moe=replace(moe, **changes.get("moe", {})),
        parallel=ParallelConfig(
            engine=changes.get("engine", "fsdp2"), dp_shard=world, ep=ep, cp=changes.get("cp", 1)
        ),
        deepspeed=DeepSpeedConfig(**changes.get("deepspeed", {})),
        data=DataConfig(seq_len=S, document_mask=changes.get("document_mask", False)),
        # Clipping is active in every step. Epsilon is above the least gradients, of which Adam
        # would make the last bits as large as any other update.
        optim=OptimConfig(lr=1e-3, eps=1e-4, clip_norm=0.05),
        train=TrainConfig(
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro,
            activation_checkpoint=changes.get("activation_checkpoint", "none"),
            dtype="fp32",
        ),
    )
    return with_values(config, changes.get("settings", {}))


def own_batches(
    step: int, rank: int, world: int, micro: int, *, cp: int = 1, masked: bool = False
) -> list[Batch]:
    rows = TOKENS[step][
        torch.from_numpy(rank_positions(GLOBAL_BATCH, micro, rank=rank, world=world, cp=cp))
    ]
    batches = [Batch(tokens[:, :-1], tokens[:, 1:]) for tokens in rows]
    if masked:
        batches = [mask_documents(batch, eod_id=END) for batch in batches]
    return [batch.of_part(ContextPart.of_rank(rank, cp)) for batch in batches]


def logical(engine: Engine, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Whole tensors from the shards of all ranks."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone().numpy()
        for name, t in tensors.items()
    }


def gradients_of(engine: Engine) -> dict[str, Tensor]:
    """Summed over the ranks, after the last backward of a step."""
    if engine.config.parallel.engine == "deepspeed":
        from deepspeed.utils import safe_get_full_grad

        state = engine.state
        return {
            name: state._sharded(safe_get_full_grad(p), is_expert=name in state.experts)
            for name, p in state.named.items()
        }
    # With one rank the fp32 masters hold the gradients, else the parameters do.
    holder = getattr(engine, "master", None) or dict(engine.model.named_parameters())
    return {name: p.grad for name, p in holder.items()}


def train(rank: int, config: Config, world: int, steps: int) -> dict[str, Any]:
    group, mesh = None, None
    if config.parallel.engine != "single":
        mesh = build_mesh(config.parallel, device_type="cpu")
        group = torch.distributed.group.WORLD
    engine = make_engine(config, mesh, CPU)
    initial = logical(engine, engine.state_dict()["model"])
    gradients: dict[str, np.ndarray] = {}
    losses, norms, decisions = [], [], []
    for step in range(steps):
        if step == 0:
            discard, real_step = engine.discard, engine.step

            def look(lr: float, engine: Engine = engine, real_step: Any = real_step) -> Any:
                gradients.update(logical(engine, gradients_of(engine)))
                return real_step(lr)

            engine.step = look  # type: ignore[method-assign]
        outcome = train_step(
            engine,
            own_batches(
                step,
                rank,
                world,
                config.train.micro_batch_size,
                cp=config.parallel.cp,
                masked=config.data.document_mask,
            ),
            lr=config.optim.lr,
            moe=config.moe,
            device=CPU,
            group=group,
        )
        engine.step, engine.discard = real_step, discard  # type: ignore[method-assign]
        losses.append((outcome.loss, outcome.load_balance_loss, outcome.z_loss))
        norms.append(outcome.grad_norm)
        decisions.append(
            sum(sum(layer.target_E for layer in layers) for layers in outcome.layers).tolist()
        )
    final = logical(engine, engine.state_dict()["model"])
    engine.close()
    return {
        "initial": initial,
        "losses": np.array(losses),
        "norms": np.array(norms),
        "gradients": gradients,
        "final": final,
        "decisions": decisions,
    }


def run(
    world: int, ep: int, micro: int, *, steps: int = STEPS, **changes: Any
) -> list[dict[str, Any]]:
    config = config_for(world, ep, micro, **changes)
    return run_ranks(train, world, config, world, steps)


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    return run(1, 1, LAW[1, 1], engine="single")[0]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


@pytest.fixture(scope="module")
def short_oracle() -> dict[str, Any]:
    return run(1, 1, LAW[1, 1], engine="single", steps=FEW_STEPS)[0]


def assert_equal_runs(result: dict[str, Any], oracle: dict[str, Any]) -> None:
    for name, want in oracle["initial"].items():
        assert np.array_equal(result["initial"][name], want), name
    assert relative(result["losses"], oracle["losses"]) < 1e-5
    assert relative(result["norms"], oracle["norms"]) < 1e-5
    assert min(oracle["norms"]) > 0.05
    worst = max(relative(result["gradients"][n], g) for n, g in oracle["gradients"].items())
    assert worst < 1e-5
    assert set(result["gradients"]) == set(oracle["gradients"])
    moved = max(relative(result["final"][n], w) for n, w in oracle["final"].items())
    assert moved < 1e-5
    losses = relative(result["losses"], oracle["losses"])
    print(f"losses {losses:.1e}, gradients {worst:.1e}, weights {moved:.1e}")


@pytest.mark.parametrize(("world", "ep"), list(LAW))
def test_parity_law_with_rounding(world: int, ep: int, oracle: dict[str, Any]) -> None:
    results = run(world, ep, LAW[world, ep])
    for result in results:
        assert_equal_runs(result, oracle)
    # One rank of every ep group: their rounded counts add up to the oracle's, as integers.
    groups = [results[rank]["decisions"] for rank in range(0, world, ep)]
    assert np.array_equal(np.sum(groups, axis=0), oracle["decisions"])


class SelectedPairs:
    """The pairs that every rank chose, in the order of its decisions: layer by layer, micro-batch
    by micro-batch, step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_rank: dict[int, list[Tensor]] = {}
        self._round = layer_room.round_scores
        monkeypatch.setattr(layer_room, "round_scores", self._record)

    def _record(self, scores: Scores, exchange: Exchange, rounding: RoundingConfig) -> Rounded:
        rounded = self._round(scores, exchange, rounding)
        self.by_rank.setdefault(exchange.rank, []).append(rounded.selected_TE)
        return rounded

    def take(self) -> list[Tensor]:
        """Of every decision [tokens of all ranks, E], ranks in order; forgotten afterwards."""
        lists = [self.by_rank[rank] for rank in sorted(self.by_rank)]
        self.by_rank = {}
        return [torch.cat(parts) for parts in zip(*lists, strict=True)]


@pytest.mark.parametrize(("rule", "steps"), [("balance", STEPS), ("score", 3)])
def test_the_number_of_ranks_changes_no_pair(
    rule: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks 1, 2 and 4, balance_groups fixed: the same pairs in every layer at step 1, and the same
    losses in all steps."""
    changes = {"moe": {"rounding": RoundingConfig(rule, tile=8, balance_groups=4)}}
    recorder = SelectedPairs(monkeypatch)
    want = run(1, 1, LAW[1, 1], engine="single", steps=steps, **changes)[0]
    want_pairs = recorder.take()
    # Two MoE layers, two micro-batches.
    assert len(want_pairs) == 2 * 2 * steps
    for num_ranks in (2, 4):
        results = run(num_ranks, num_ranks, LAW[num_ranks, num_ranks], steps=steps, **changes)
        pairs = recorder.take()
        for place in range(4):
            assert torch.equal(pairs[place], want_pairs[place]), place
        for result in results:
            assert relative(result["losses"], want["losses"]) < 1e-5
        same = sum(map(torch.equal, pairs, want_pairs))
        # Later steps start from activations that differ in their last bits.
        assert same >= 0.9 * len(pairs)
        print(f"{rule}, {num_ranks} ranks: {same} of {len(pairs)} decisions equal")


UNROUNDED = {"moe": {"load_balance_scope": "global", "rounding": RoundingConfig("none", tile=8)}}


@functools.cache
def unrounded_oracle(micro: int) -> dict[str, Any]:
    return run(1, 1, micro, engine="single", steps=FEW_STEPS, **UNROUNDED)[0]


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_parity_law_of_one_global_batch(world: int, ep: int) -> None:
    """Without accumulation and rounding: the load-balance loss is over the whole global batch."""
    for result in run(world, ep, GLOBAL_BATCH // world, steps=FEW_STEPS, **UNROUNDED):
        assert_equal_runs(result, unrounded_oracle(GLOBAL_BATCH))


BIASED = {"moe": {"router": "sigmoid_topk", "bias_update_rate": 0.003, "score_scale": 1.5}}


@pytest.fixture(scope="module")
def biased_oracle() -> dict[str, Any]:
    return run(1, 1, LAW[1, 1], engine="single", steps=FEW_STEPS, **BIASED)[0]


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 4)])
def test_parity_law_with_sigmoid_and_bias(
    world: int, ep: int, biased_oracle: dict[str, Any]
) -> None:
    results = run(world, ep, LAW[world, ep], steps=FEW_STEPS, **BIASED)
    for result in results:
        assert_equal_runs(result, biased_oracle)
        biases = [name for name in result["final"] if name.endswith("bias_E")]
        assert len(biases) == 2
        for name in biases:
            assert np.array_equal(result["final"][name], biased_oracle["final"][name])
            assert len(np.unique(result["final"][name])) > 2
    groups = [results[rank]["decisions"] for rank in range(0, world, ep)]
    assert np.array_equal(np.sum(groups, axis=0), biased_oracle["decisions"])


def test_a_replay_does_not_move_the_bias(biased_oracle: dict[str, Any]) -> None:
    changes = BIASED | {"activation_checkpoint": "full"}
    result = run(2, 2, LAW[2, 2], steps=FEW_STEPS, **changes)[0]
    for name in (name for name in result["final"] if name.endswith("bias_E")):
        assert np.array_equal(result["final"][name], biased_oracle["final"][name])


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 4)])
def test_parity_law_of_the_step_so_far(world: int, ep: int) -> None:
    """With accumulation, too: every line of the law has the same two micro-batches."""
    for result in run(world, ep, GLOBAL_BATCH // 2 // world, steps=FEW_STEPS, **UNROUNDED):
        assert_equal_runs(result, unrounded_oracle(GLOBAL_BATCH // 2))


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2)])
def test_activation_checkpoint_changes_nothing(
    mode: str, world: int, ep: int, short_oracle: dict[str, Any]
) -> None:
    results = run(world, ep, LAW[world, ep], steps=FEW_STEPS, activation_checkpoint=mode)
    assert_equal_runs(results[0], short_oracle)


LATENT = {
    "settings": {
        "model.attention": "mla",
        "model.mla": MlaConfig(12, 20, 6, 4, 8),
        "model.head_dim": 10,
    }
}


def test_parity_law_of_latent_attention() -> None:
    want = run(1, 1, LAW[1, 1], engine="single", steps=1, **LATENT)[0]
    for result in run(2, 2, LAW[2, 2], steps=1, **LATENT):
        assert_equal_runs(result, want)


def test_parity_law_of_short_rows(oracle: dict[str, Any]) -> None:
    """Rows are rounded alike by one rank, by two, and when a forward is made again."""
    short = {"settings": {"moe.dispatch.row_dtype": "fp8"}}
    want = run(1, 1, LAW[1, 1], engine="single", steps=2, **short)[0]
    name = next(name for name in oracle["gradients"] if "w_in" in name)
    assert relative(want["gradients"][name], oracle["gradients"][name]) > 1e-3
    for result in run(2, 2, LAW[2, 2], steps=2, activation_checkpoint="full", **short):
        assert_equal_runs(result, want)


def test_parity_law_inside_of_documents(oracle: dict[str, Any]) -> None:
    """Ranks have different numbers of documents, and of tokens with a loss."""
    want = run(1, 1, LAW[1, 1], engine="single", steps=3, document_mask=True)[0]
    assert relative(want["losses"], oracle["losses"][:3]) > 1e-4
    results = run(2, 2, LAW[2, 2], steps=3, activation_checkpoint="full", document_mask=True)
    for result in results:
        assert_equal_runs(result, want)


# (world, cp, ep) -> sequences of a micro-batch. A population of four needs a multiple of cp as ep;
# without rounding an ep group may have parts of sequences.
CONTEXT_LAW = {(2, 2, 1): 4, (2, 2, 2): 4, (4, 2, 2): 4, (4, 2, 4): 2, (4, 4, 2): 4, (4, 4, 4): 4}
CONTEXT_CHANGES: dict[str, dict[str, Any]] = {
    "rounding": {"activation_checkpoint": "selective"},
    "no rounding": UNROUNDED,
    "sequence": {"moe": {"load_balance_scope": "sequence"}},
    "documents": {"document_mask": True, "activation_checkpoint": "full"},
    "latent": LATENT,
}


@functools.cache
def context_oracle(name: str) -> dict[str, Any]:
    return run(1, 1, LAW[1, 1], engine="single", steps=2, **CONTEXT_CHANGES[name])[0]


@pytest.mark.parametrize(
    ("world", "cp", "ep", "name"),
    [
        (2, 2, 1, "no rounding"),
        (2, 2, 2, "rounding"),
        (4, 2, 2, "documents"),
        (4, 2, 4, "sequence"),
        (4, 4, 2, "no rounding"),
        (4, 4, 4, "latent"),
    ],
)
def test_parity_law_of_shared_sequences(world: int, cp: int, ep: int, name: str) -> None:
    """The same tokens are rounded together, in another order."""
    want, changes = context_oracle(name), CONTEXT_CHANGES[name]
    results = run(world, ep, CONTEXT_LAW[world, cp, ep], cp=cp, steps=2, **changes)
    for result in results:
        assert_equal_runs(result, want)
    groups = [results[rank]["decisions"] for rank in range(0, world, ep)]
    assert np.array_equal(np.sum(groups, axis=0), want["decisions"])


def test_recomputation_never_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = layer_room.round_scores
    monkeypatch.setattr(layer_room, "round_scores", lambda *a: (calls.append(1), real(*a))[1])
    run(1, 1, LAW[1, 1], engine="single", activation_checkpoint="full", steps=1)
    # Two MoE layers, two micro-batches: forward only.
    assert len(calls) == 2 * 2
