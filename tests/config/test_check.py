"""Relations between settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_problems import MakeConfig, problems

from distmoe.config import check


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_right_config_passes(make_config: MakeConfig, world: int, ep: int) -> None:
    if world % ep == 0:
        check(make_config(f"--parallel.ep={ep}"), world)


@pytest.mark.parametrize(
    ("options", "world", "expected"),
    [
        ("--moe.top_k=17", 1, "moe.top_k is 17; it must be in 1..moe.num_experts (16)"),
        (
            "--moe.rounding.rule=balanced",
            1,
            "moe.rounding.rule is 'balanced'; it must be one of none, nearest, balance, up, down, "
            "stochastic, score; did you mean balance?",
        ),
        (
            "--moe.num_experts=6 --parallel.ep=4",
            4,
            "moe.num_experts is 6; it must be a multiple of parallel.ep (4)",
        ),
        (
            "--moe.rounding.balance_groups=3",
            1,
            "moe.rounding.balance_groups is 3; it must be 0 or divide moe.num_experts (16)",
        ),
        (
            "--moe.rounding.balance_groups=2 --moe.rounding.capacity_factor=1.5 "
            "--moe.rounding.capacity_of=rank --parallel.ep=4",
            4,
            "moe.rounding.balance_groups is 2; it must be 0 or a multiple of parallel.ep (4) with",
        ),
        (
            "--checkpoint.resume=never --run.dir=x --checkpoint.init_from=x/checkpoints/step-1",
            1,
            "checkpoint.init_from is x/checkpoints/step-1; it must be of another run with",
        ),
        (
            "--model.n_heads=5 --model.n_kv_heads=1",
            1,
            "model.n_heads is 5; it must divide model.hidden_size (256), unless model.head_dim",
        ),
        ("--model.head_dim=33", 1, "model.head_dim is 33; it must be even, as RoPE turns pairs"),
        (
            "--model.n_kv_heads=3",
            1,
            "model.n_kv_heads is 3; it must divide model.n_heads (4)",
        ),
        ("--model.attention=mha", 1, "model.attention is 'mha'; it must be one of gqa, mla"),
        (
            "--model.partial_rotary_factor=0.3",
            1,
            "model.partial_rotary_factor is 0.3; it must give an even part of model.head_dim (64)",
        ),
        (
            "--model.attention=mla --model.mla.qk_rope_head_dim=7",
            1,
            "model.mla.qk_rope_head_dim is 7; it must be even, as RoPE turns pairs",
        ),
        (
            "--model.attention=mla --model.head_dim=64",
            1,
            "model.head_dim is 64; it must be 0 or model.mla.qk_nope_head_dim + model.mla.qk_rope",
        ),
        (
            "--model.yarn.beta_slow=33",
            1,
            "model.yarn.beta_slow is 33.0; it must be at most model.yarn.beta_fast (32)",
        ),
        (
            "--model.n_dense_layers=5",
            1,
            "model.n_dense_layers is 5; it must be in 0..model.n_layers (4)",
        ),
        (
            "--moe.router=topk_softmax --moe.renormalize=none",
            1,
            "moe.renormalize is none; it must be topk with moe.router 'topk_softmax'",
        ),
        (
            "--moe.bias_update_rate=1e-8",
            1,
            "moe.bias_update_rate is 1e-08; it must be 0 or at least 5.960464477539063e-08",
        ),
        (
            "--moe.router=hash --moe.bias_update_rate=1e-3",
            1,
            "moe.bias_update_rate is 0.001; it must be 0 with moe.router 'hash', whose choice",
        ),
        (
            "--moe.rounding.capacity_factor=0.9",
            1,
            "moe.rounding.capacity_factor is 0.9; it must be 0 for no bound, or at least 1",
        ),
        (
            "--moe.rounding.capacity_factor=-1.5",
            1,
            "moe.rounding.capacity_factor is -1.5; it must be at least 0",
        ),
        (
            "--moe.expert_groups=3 --moe.groups_per_token=2",
            1,
            "moe.expert_groups is 3; it must be 0, 1 or divide moe.num_experts (16)",
        ),
        (
            "--moe.expert_groups=4",
            1,
            "moe.groups_per_token is 0; it must be in 1..moe.expert_groups (4)",
        ),
        (
            "--moe.expert_groups=4 --moe.groups_per_token=5",
            1,
            "moe.groups_per_token is 5; it must be in 1..moe.expert_groups (4)",
        ),
        (
            "--moe.groups_per_token=2",
            1,
            "moe.groups_per_token is 2; it must be 0 without moe.expert_groups",
        ),
        (
            "--moe.expert_groups=8 --moe.groups_per_token=1",
            1,
            "moe.top_k is 4; it must be at most 2, moe.groups_per_token (1) * the experts of a "
            "group (2)",
        ),
        (
            "--moe.expert_groups=8 --moe.groups_per_token=2 --moe.nodes_per_token=1",
            1,
            "moe.nodes_per_token is 1; it must be 0 with moe.expert_groups (8): one of both",
        ),
        (
            "--moe.nodes_per_token=1 --parallel.ep=8 --parallel.ranks_per_node=3",
            8,
            "parallel.ranks_per_node is 3; it must divide parallel.ep (8), or be a multiple of it, "
            "with moe.nodes_per_token (1)",
        ),
        (
            "--moe.nodes_per_token=1 --parallel.ep=8",
            8,
            "parallel.ranks_per_node is 0; it must be at least 1 with moe.nodes_per_token (1) "
            "where no launcher reports it",
        ),
        (
            "--moe.nodes_per_token=1 --parallel.ep=8 --parallel.ranks_per_node=1",
            8,
            "moe.top_k is 4; it must be at most 2, moe.nodes_per_token (1) * the experts of a "
            "node (2)",
        ),
        (
            "--moe.router=balanced --moe.top_k=3 --moe.expert_groups=4 --moe.groups_per_token=1",
            1,
            "moe.groups_per_token is 1; it must be at least 2 with moe.router 'balanced'",
        ),
        ("--moe.hidden_size=8", 1, "moe.hidden_size is 8; it must be 0 or model.hidden_size (256)"),
        (
            "--moe.rounding.tile=513 --train.micro_batch_size=1 --parallel.ep=2",
            2,
            "moe.rounding.tile is 513; it must be at most the tokens of an expert-parallel group's "
            "micro-batch, train.micro_batch_size * data.seq_len * parallel.ep (512)",
        ),
        (
            "--parallel.dp_replicate=3",
            4,
            "parallel.dp_replicate is 3; it must divide the number of ranks (4)",
        ),
        (
            "--parallel.dp_replicate=2 --parallel.dp_shard=4",
            4,
            "parallel.dp_shard is 4; it must be 0 or 2, the ranks (4) / parallel.dp_replicate (2)",
        ),
        (
            "--parallel.ep=4",
            2,
            "parallel.ep is 4; it must divide parallel.dp_shard (2; the number of ranks is 2)",
        ),
        (
            "--parallel.engine=single",
            2,
            "parallel.engine is single; it must be auto, fsdp2 or deepspeed for 2 ranks",
        ),
        (
            "--parallel.engine=deepspeed --deepspeed.zero_stage=0",
            2,
            "deepspeed.zero_stage is 0; it must be 1, 2 or 3: without ZeRO, DeepSpeed clips by a "
            "norm that is wrong for experts",
        ),
        (
            "--parallel.engine=deepspeed --parallel.dp_replicate=2",
            2,
            "parallel.dp_replicate is 2; it must be 1 with parallel.engine 'deepspeed', which "
            "shards over all ranks",
        ),
        (
            "--parallel.engine=deepspeed --deepspeed.offload_parameters=cpu",
            2,
            "deepspeed.offload_parameters is cpu; it must be none with deepspeed.zero_stage 2, "
            "which keeps whole parameters",
        ),
        (
            "--parallel.engine=deepspeed --optim.name=muon",
            2,
            "optim.name is muon; it must be adamw with parallel.engine 'deepspeed', which shards "
            "without regard to matrices",
        ),
        (
            "--moe.dispatch.exchange=local --parallel.ep=2",
            2,
            "moe.dispatch.exchange is local; it must be auto or one of p2p, all_to_all, threaded, "
            "mpi with parallel.ep (2)",
        ),
        (
            "--moe.dispatch.order=source --moe.dispatch.steps=2 --parallel.ep=2",
            2,
            "moe.dispatch.steps is 2; it must be at most 1 with moe.dispatch.order source and "
            "parallel.ep 2",
        ),
        (
            "--parallel.profile=no/such/file.toml",
            1,
            "parallel.profile is no/such/file.toml; it must be empty or a file that `distmoe "
            "doctor comm --save` wrote",
        ),
        (
            "--moe.kernel_tiles=no/such/file.toml",
            1,
            "moe.kernel_tiles is no/such/file.toml; it must be auto, default or a file that "
            "`tools/bench_moe.py --write-tiles` wrote",
        ),
        (
            "--parallel.cp=3 --data.seq_len=252",
            4,
            "parallel.cp is 3; it must divide parallel.dp_shard (4; the number of ranks is 4)",
        ),
        (
            "--parallel.cp=4 --parallel.dp_replicate=2",
            4,
            "parallel.cp is 4; it must divide parallel.dp_shard (2; the number of ranks is 4)",
        ),
        (
            "--parallel.cp=2 --data.seq_len=30",
            2,
            "data.seq_len is 30; it must be a multiple of 2 * parallel.cp (4)",
        ),
        (
            "--parallel.cp=2 --train.global_batch_size=15",
            4,
            "train.global_batch_size is 15; it must be a multiple of the number of ranks (4) / "
            "parallel.cp (2)",
        ),
        (
            "--parallel.cp=2 --train.global_batch_size=12 --train.micro_batch_size=8",
            4,
            "train.global_batch_size is 12; it must be a multiple of 16, the ranks (4) / "
            "parallel.cp (2) * train.micro_batch_size (8)",
        ),
        (
            "--parallel.cp=2 --train.micro_batch_size=1 --data.seq_len=16 --moe.rounding.tile=16",
            2,
            "moe.rounding.tile is 16; it must be at most the tokens of an expert-parallel group's "
            "micro-batch, train.micro_batch_size * data.seq_len / parallel.cp * parallel.ep (8)",
        ),
        (
            "--train.global_batch_size=15",
            2,
            "train.global_batch_size is 15; it must be a multiple of the number of ranks (2)",
        ),
        (
            "--train.global_batch_size=12 --train.micro_batch_size=4",
            2,
            "train.global_batch_size is 12; it must be a multiple of 8, the ranks (2) * "
            "train.micro_batch_size (4)",
        ),
        (
            "--optim.warmup_steps=201",
            1,
            "optim.warmup_steps is 201; it must be at most train.steps (200)",
        ),
        (
            "--optim.schedule=wsd --optim.decay_steps=181",
            1,
            "optim.decay_steps is 181; it must be at most the steps after the warm-up, "
            "train.steps - optim.warmup_steps (180)",
        ),
        (
            "--train.compile=dense --parallel.engine=deepspeed --deepspeed.zero_stage=3",
            2,
            "train.compile is dense; it must be none with deepspeed.zero_stage 3, whose hooks ",
        ),
        (
            "--checkpoint.resume=no/such/folder",
            1,
            "checkpoint.resume is no/such/folder; it must be auto, never or the folder of a "
            "complete checkpoint, which has a manifest.json",
        ),
        (
            "--checkpoint.resume=configs",
            1,
            "checkpoint.resume is configs; it must be auto, never or the folder of a "
            "complete checkpoint, which has a manifest.json",
        ),
        ("--run.dir=Makefile", 1, "run.dir is Makefile; it must be a folder, and there is a file"),
        (
            "--run.dir=Makefile/run",
            1,
            "run.dir is Makefile/run; it must be a folder that can be written, and ",
        ),
        (
            "--model.vocab_size=511",
            1,
            "model.vocab_size is 511; it must be 0 or at least the 512 tokens of the tokenizer",
        ),
    ],
)
def test_broken_relation_is_the_only_complaint(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    world: int,
    expected: str,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    (problem,) = problems(make_config(*options.split()), world)
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    ("options", "by"),
    [
        ("--moe.num_experts=8 --moe.intermediate_size=127", "expert"),
        ("--moe.num_experts=6", "row"),
        ("--moe.num_experts=6 --moe.intermediate_size=126", "row"),
        ("--moe.num_experts=6 --moe.intermediate_size=126 --moe.activation=relu2", None),
        ("--moe.num_experts=6 --moe.intermediate_size=127", None),
        ("--moe.num_experts=6 --model.hidden_size=126 --model.head_dim=32", None),
    ],
)
def test_four_ranks_share_three_experts_by_rows_only(
    make_config: MakeConfig, options: str, by: str | None
) -> None:
    config = make_config(*options.split(), "--parallel.ep=2")
    if by is not None:
        check(config, 8)
    else:
        (problem,) = problems(config, 8)
        assert problem.startswith(
            "moe.num_experts is 6; it must be a multiple of parallel.dp_shard"
        )


def test_node_by_node_has_as_many_steps_as_wanted(make_config: MakeConfig) -> None:
    options = [f"--moe.dispatch.{option}" for option in ("level=node", "order=source", "steps=4")]
    check(make_config("--parallel.ep=2", *options), 2)


def test_rounding_none_needs_no_tile(make_config: MakeConfig) -> None:
    check(make_config("--moe.rounding.rule=none", "--moe.rounding.tile=1000000"), 1)


def test_all_problems_are_reported_at_once(make_config: MakeConfig) -> None:
    config = make_config("--moe.top_k=99", "--optim.lr=0", "--moe.router=x", "--train.steps=5")
    starts = ["optim.lr is 0", "moe.router is 'x'", "moe.top_k is 99", "optim.warmup_steps is 20"]
    found = problems(config)
    assert [problem[: len(start)] for problem, start in zip(found, starts, strict=True)] == starts
