"""Training runs of the parity law: small, over ranks as threads, and what must be equal of them.

Rounding is over the tokens of an ep group, so each line of the table keeps that population at four
sequences: (1, 1) and (2, 2) take two micro-batches where (2, 1) and (4, 2) have two groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

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

# Runs that differ from `config_for`'s in one thing.
UNROUNDED = {"moe": {"load_balance_scope": "global", "rounding": RoundingConfig("none", tile=8)}}
BIASED = {"moe": {"router": "sigmoid_topk", "bias_update_rate": 0.003, "score_scale": 1.5}}
LATENT = {
    "settings": {
        "model.attention": "mla",
        "model.mla": MlaConfig(12, 20, 6, 4, 8),
        "model.head_dim": 10,
    }
}


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


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


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
