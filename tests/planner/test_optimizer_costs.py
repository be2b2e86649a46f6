"""What an optimizer computes and sends, against the optimizer itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distmoe.bench.live_storages import LiveStorages
from distmoe.config import Config, ModelConfig, MoEConfig, resolve
from distmoe.config.keys import with_values
from distmoe.engines.single import SingleEngine
from distmoe.planner.collective_time import Collectives, RankGroup
from distmoe.planner.engine_costs import Job
from distmoe.planner.engine_costs.single import SingleCosts
from distmoe.planner.hardware import find_hardware
from distmoe.planner.job_stages import job_stages
from distmoe.planner.optimizer_costs import muon_units
from distmoe.planner.parameter_shapes import model_units
from distmoe.planner.step_moments import Moment, Stage

MUON = {"optim.name": "muon"}
H100 = find_hardware("h100")


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_products_and_buffers_are_those_of_an_update(activation: str) -> None:
    config = Config(
        model=ModelConfig(vocab_size=64, hidden_size=64, n_layers=2, intermediate_size=96),
        moe=MoEConfig(intermediate_size=48, num_experts=8, activation=activation),
    )
    settings = {"moe.shared_intermediate_size": 24, "run.device": "cpu", "train.dtype": "fp32"}
    config = resolve(with_values(config, MUON | settings), 1)
    storages = LiveStorages()
    with storages:
        engine = SingleEngine(config, None, torch.device("cpu"))
        for weight in engine.master.values():
            weight.grad = torch.ones_like(weight)
        # The moments are there.
        engine.optimizer.step()
        storages.phase, before = "update", storages.read()
        with FlopCounterMode(display=False) as counter:
            engine.optimizer.step()
    units = model_units(config)
    muon = muon_units(config, units)
    assert counter.get_total_flops() == muon.dense_flops + muon.expert_flops
    predicted = SingleCosts(Job(config, 1, units, 4, on_gpu=False)).held(Moment(Stage.STEP, -1))
    assert storages.peak["update"] - before == pytest.approx(predicted.buffers, rel=0.1)


def test_muon_takes_longer_and_less_on_more_ranks() -> None:
    def update_s(world: int, **settings: object) -> float:
        sizes = {"model.hidden_size": 1024, "moe.intermediate_size": 512, "moe.num_experts": 32}
        layout = {"parallel.ep": 8, "parallel.engine": "fsdp2", "train.global_batch_size": world}
        config = resolve(with_values(Config(), sizes | layout | settings), world)
        return job_stages(config, H100, dtype="bf16").update_s

    muon = update_s(16, **MUON)
    assert muon > 1.5 * update_s(16)
    assert update_s(32, **MUON) < muon


def test_matrices_travel_to_their_owners_at_the_slower_link() -> None:
    links = Collectives(H100.profile, 8)
    node, remote = (links.profile.link(name) for name in ("node", "remote"))
    in_node = links.all_to_all(RankGroup(8, 8), 8e9)
    assert in_node.seconds == pytest.approx(node.latency_s + 7e9 / node.bytes_per_s)
    over_nodes = links.all_to_all(RankGroup(16, 8), 16e9)
    assert over_nodes.remote_s == pytest.approx(8e9 / remote.bytes_per_s)
    assert over_nodes.node_s == pytest.approx(7e9 / node.bytes_per_s)
    assert links.all_to_all(RankGroup(1, 1), 8e9).seconds == 0
