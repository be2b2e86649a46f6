"""Parts of Muon; its training as a whole is in test_training_by_hand.py."""

from __future__ import annotations

from collections import Counter
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from parity_runs import CPU, LAW, config_for, logical, own_batches
from ranks import run_ranks
from torch import Tensor

from distmoe.checkpoint.load import load
from distmoe.checkpoint.store import CheckpointStore, checkpoint_group
from distmoe.config import Config
from distmoe.engines import Engine, make_engine, newton_schulz
from distmoe.engines.matrix_exchange import MatrixExchange, Stack
from distmoe.engines.muon import Muon
from distmoe.engines.newton_schulz import orthogonalize_
from distmoe.kernels.testing import assert_as_good_as
from distmoe.mesh import build_mesh
from distmoe.model.matrices import matrix_rows
from distmoe.model.transformer import Transformer
from distmoe.train.step import train_step

MUON = {"settings": {"optim.name": "muon"}}


def by_singular_values(x_BMN: Tensor) -> Tensor:
    """The same in fp64: U p(S) V^T, p the polynomial five times."""
    u, s, vt = torch.linalg.svd(x_BMN.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s[:, None] @ vt).float()


def by_torch(x_MN: Tensor) -> Tensor:
    """What torch.optim.Muon, which has a Newton-Schulz of its own in bf16, takes off zeros."""
    weight = torch.nn.Parameter(torch.zeros_like(x_MN))
    weight.grad = x_MN
    optimizer = torch.optim.Muon([weight], lr=1.0, adjust_lr_fn="match_rms_adamw")
    optimizer.step()
    return -weight.detach()


def by_formula(x_BMN: Tensor) -> Tensor:
    x = x_BMN / x_BMN.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8), (1, 16, 16)])
def test_orthogonal_as_by_singular_values(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A matrix at a time.
    monkeypatch.setattr(newton_schulz, "BATCH_ELEMENTS", shape[1] * shape[2])
    x_BMN = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x_BMN[0, :, 0] = 0
    exact, in_fp32 = by_singular_values(x_BMN), by_formula(x_BMN)
    torchs = torch.stack([by_torch(x) for x in x_BMN]) / (0.2 * sqrt(max(shape[1:])))
    assert_as_good_as(orthogonalize_(x_BMN.bfloat16()), torchs, exact, "bf16")
    assert orthogonalize_(x_BMN) is x_BMN
    assert_as_good_as(x_BMN, in_fp32, exact, "fp32")


def test_nothing_stays_nothing() -> None:
    assert not orthogonalize_(torch.zeros(2, 4, 3)).any()


# Rows that no number of ranks divides, fewer rows than ranks, a batch, and parts of several sizes.
STACKS = [Stack(1, (5,), 4), Stack(1, (2,), 3), Stack(2, (3, 4), 4), Stack(1, (5, 2), 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_on_whole_matrices_however_they_are_cut(dtype: torch.dtype) -> None:
    shapes = [(s.batch, sum(s.rows), s.columns) for s in STACKS]
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randint(-3, 4, shape, generator=generator).to(dtype) for shape in shapes]

    def work(x_BMN: Tensor) -> Tensor:
        """Integers, and other ones for a matrix that is not whole."""
        return x_BMN + x_BMN.sum((-2, -1), keepdim=True)

    def run(rank: int) -> tuple[list[Tensor], int]:
        exchange = MatrixExchange(STACKS, dist.group.WORLD)
        sizes = [-(-rows // 3) for _, rows, _ in shapes]
        own = [w[:, rank * n : (rank + 1) * n].clone() for w, n in zip(whole, sizes, strict=True)]
        exchange.apply_(own, work)
        return own, len(exchange.owned[rank])

    parts, owned = zip(*run_ranks(run, 3), strict=True)
    for number, (stack, weight) in enumerate(zip(STACKS, whole, strict=True)):
        want = torch.cat([work(x) for x in weight.split(list(stack.rows), 1)], 1)
        assert torch.equal(torch.cat([part[number] for part in parts], 1), want)
    # Eight matrices, and everybody has work.
    assert sum(owned) == 8
    assert min(owned) > 1


def test_matrices_of_a_model() -> None:
    """Of one dense and one MoE block; nothing outside of blocks, no router, no norm."""
    config = config_for(1, 1, 4, settings={"model.n_layers": 2})
    with torch.device("meta"):
        found = matrix_rows(Transformer(config))
    attention = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
    want = {
        f"blocks.{block}.attention.{name}.weight": (rows,)
        for block in (0, 1)
        for name, rows in attention.items()
    }
    want |= {"blocks.0.mlp.in_proj.weight": (48, 48), "blocks.0.mlp.out_proj.weight": (32,)}
    want |= {"blocks.1.mlp.experts.w_in_eGH": (16, 16), "blocks.1.mlp.experts.w_out_eHI": (32,)}
    want |= {"blocks.1.mlp.shared.in_proj.weight": (8, 8)}
    want |= {"blocks.1.mlp.shared.out_proj.weight": (32,)}
    assert found == want


def next_loss(engine: Engine, config: Config, step: int) -> float:
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = own_batches(step, rank, world, config.train.micro_batch_size)
    options = {"lr": 1e-3, "moe": config.moe, "device": CPU, "group": dist.group.WORLD}
    return train_step(engine, batches, **options).loss


def build(world: int, ep: int) -> tuple[Config, Engine]:
    config = config_for(world, ep, LAW[world, ep], **MUON)
    return config, make_engine(config, build_mesh(config.parallel, device_type="cpu"), CPU)


def test_a_checkpoint_fits_other_ranks(tmp_path: Path) -> None:
    """Experts that were over ep are over efsdp."""

    def states(engine: Engine) -> dict[str, np.ndarray]:
        state = engine.state_dict()["optimizer"]
        tensors = {f"{n}.{key}": t for n, one in state.items() for key, t in one.items()}
        return logical(engine, tensors)

    def save(rank: int) -> Any:
        config, engine = build(2, 2)
        next_loss(engine, config, 0)
        group = checkpoint_group(timeout_s=60)
        store = CheckpointStore(tmp_path, group=group, keep_last=1, asynchronous=False)
        store.save(1, engine.state_dict())
        return states(engine), next_loss(engine, config, 1)

    def go_on(rank: int) -> Any:
        config, engine = build(2, 1)
        assert isinstance(engine.optimizer, Muon)
        engine.load_state_dict(load(tmp_path / "step-00000001", engine.state_dict()))
        return states(engine), next_loss(engine, config, 1)

    want, loss = run_ranks(save, 2)[0]
    found, own_loss = run_ranks(go_on, 2)[0]
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert np.array_equal(found[name], value), name
        assert value.any(), name
    # One buffer of a matrix, two moments and a step of anything else.
    kinds = Counter(name.rpartition(".")[2] for name in want)
    assert kinds == {"momentum": 22, "exp_avg": 17, "exp_avg_sq": 17, "step": 17}
    assert abs(own_loss - loss) < 1e-5 * loss
