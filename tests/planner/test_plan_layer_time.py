"""Work of layers and times of collectives, by hand and against the FLOPs of metrics."""

from dataclasses import replace

import pytest

from distmoe.config import Config, ModelConfig, MoEConfig, TrainConfig, resolve
from distmoe.metrics.flops import flops_per_token, parameter_counts
from distmoe.planner.collective_time import Collectives, RankGroup, Transfer
from distmoe.planner.layer_time import OP_S, Rates, Work, model_passes
from distmoe.planner.machine_profile import Link, Profile
from distmoe.planner.measure_collectives import TENSOR_BYTES, shares_of_a_ring
from distmoe.planner.step_parts import StepPart

CONFIG = resolve(
    replace(
        Config(),
        model=ModelConfig(vocab_size=512, n_layers=3, qk_norm=False),
        moe=MoEConfig(shared_intermediate_size=64),
        train=TrainConfig(global_batch_size=2),
    ),
    1,
)
TOKENS = 2 * CONFIG.data.seq_len


def total(config: Config) -> tuple[Work, Work]:
    passes, model = model_passes(config, 2), config.model
    blocks = [passes.dense_block] * model.n_dense_layers
    blocks += [passes.moe_block] * (model.n_layers - model.n_dense_layers)
    every = [*blocks, passes.edges]
    return sum((p.forward for p in every), Work()), sum((p.backward for p in every), Work())


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_products_are_the_flops_of_the_model(kind: str) -> None:
    """6 a parameter and token, but for the look-up, norms, and routed experts; the head's in the
    forward."""
    config = replace(CONFIG, model=replace(CONFIG.model, attention=kind))
    counts = parameter_counts(config.model, config.moe)
    dense = counts.active - counts.embedding - counts.norms - counts.active_experts
    dense -= 3 * 512 if kind == "mla" else 0
    forward, backward = total(config)
    assert forward.dense_flops == 2 * TOKENS * (dense + 2 * counts.head)
    assert backward.dense_flops == 4 * TOKENS * (dense - counts.head)
    attention = TOKENS * (flops_per_token(config).model - 6 * (counts.active - counts.embedding))
    assert forward.attention_flops == attention / 3
    # The scores once more.
    assert backward.attention_flops == 2.5 * attention / 3


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_ranks_that_share_sequences_share_their_work(kind: str) -> None:
    """All but the latents' keys and values, which every rank forms for all positions."""
    config = replace(CONFIG, model=replace(CONFIG.model, attention=kind))
    shared = replace(config, parallel=replace(config.parallel, cp=4))
    alone, with_others = total(config), total(shared)
    mla = config.model.mla
    W_kv_b = 4 * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank if kind == "mla" else 0
    for factor, whole, part in zip((2, 4), alone, with_others, strict=True):
        again = 3 * factor * TOKENS * 3 * W_kv_b
        assert 4 * part.dense_flops == whole.dense_flops + again
        assert 4 * part.attention_flops == whole.attention_flops
        assert 4 * part.bytes > whole.bytes


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_repeats_forwards(recompute: str) -> None:
    train = replace(CONFIG.train, activation_checkpoint=recompute)
    plain, again = model_passes(CONFIG, 2), model_passes(replace(CONFIG, train=train), 2)
    assert again.dense_block.forward == plain.dense_block.forward
    assert again.dense_block.backward == plain.dense_block.backward + plain.dense_block.forward
    more = again.moe_block.backward.dense_flops - plain.moe_block.backward.dense_flops
    attention = 2 * TOKENS * 256 * 2 * (256 + 128)
    routed = 2 * TOKENS * 256 * (16 + 3 * 64)
    assert more == attention + (routed if recompute == "full" else 0)


def test_chunks_of_the_loss_add_up_the_gradient_of_the_head() -> None:
    chunked = replace(CONFIG, train=replace(CONFIG.train, loss_chunk_tokens=TOKENS - 1))
    one, two = model_passes(CONFIG, 2).edges, model_passes(chunked, 2).edges
    assert two.forward.dense_flops == one.forward.dense_flops
    # Twice: a product in bf16 is written and read, and the sum in fp32 read and written.
    assert two.forward.bytes - one.forward.bytes == 2 * 12 * 256 * 512
    assert two.backward.bytes - one.backward.bytes == 2 * 256 * 512


def test_seconds_of_work() -> None:
    rates = Rates(dense_flops=10.0, attention_flops=5.0, bytes_per_s=2.0)
    parts = Work(20.0, 5.0, 6.0).parts_s(rates)
    assert parts == {"dense products": 2, "attention": 1, "memory-bound": 3, "launches": 0}
    # The host needs 7 s to launch, of which 6 pass while the device works.
    assert Work(20.0, 5.0, 6.0, ops=int(7 / OP_S)).parts_s(rates)[
        StepPart.LAUNCHES
    ] == pytest.approx(1)


LINKS = Profile({"own": Link(0, 1), "node": Link(0.5, 100.0), "remote": Link(2.0, 10.0)}, {}, 0.0)


def test_collective_inside_a_node() -> None:
    found = Collectives(LINKS, 4).gather(RankGroup(4, 4), 400.0)
    assert found == Transfer(3 * 0.5 + 3.0, node_s=3.0, remote_s=0.0)


def test_collective_over_nodes_uses_the_links_of_all_members() -> None:
    """Two nodes of four: half of the tensor crosses to each, over four links. Of the ring's seven
    steps one crosses."""
    collectives, group = Collectives(LINKS, 4), RankGroup(8, 4)
    found = collectives.gather(group, 800.0)
    assert found == Transfer(6 * 0.5 + 2.0 + 10.0, node_s=7.0, remote_s=10.0)
    assert collectives.all_reduce(group, 800.0).seconds == 2 * found.seconds
    # Every second rank of a node: half of the links.
    alone = RankGroup.strided(4, stride=2, ranks_per_node=4)
    assert alone == RankGroup(4, 2)
    assert collectives.gather(alone, 800.0).remote_s == 20.0
    shared = replace(LINKS, links=dict(LINKS.links) | {"remote": Link(2.0, 10.0, shared=True)})
    assert Collectives(shared, 4).gather(group, 800.0).remote_s == 40.0


def test_a_transport_may_reach_a_share_of_the_links() -> None:
    slow = replace(LINKS, collective_share={"reduce": 0.25})
    collectives, group = Collectives(slow, 4), RankGroup(4, 4)
    ring = collectives.gather(group, 400.0)
    assert collectives.reduce(group, 400.0) == Transfer(4 * ring.seconds, 4 * ring.node_s)
    assert collectives.all_reduce(group, 400.0).seconds == 5 * ring.seconds
    measured = {"gather": 1e9, "reduce": 1e-9}
    shares = shares_of_a_ring(measured, slow, ranks=4, ranks_per_node=4)
    assert shares["gather"] == collectives.gather(group, TENSOR_BYTES).seconds / 1e9
    assert shares["reduce"] == 1


def test_one_rank_and_nothing_take_no_time() -> None:
    collectives = Collectives(LINKS, 4)
    assert collectives.gather(RankGroup(1, 1), 800.0) == Transfer()
    assert collectives.gather(RankGroup(8, 4), 0.0) == Transfer()
    assert RankGroup.strided(3, stride=8, ranks_per_node=4) == RankGroup(3, 1)
