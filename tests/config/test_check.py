from collections.abc import Callable
from pathlib import Path

import pytest

from distmoe.config import (
    Config,
    ConfigError,
    MoEConfig,
    apply_overrides,
    check,
    expert_group_problems,
)
from distmoe.config.check import NAMES
from distmoe.config.keys import key_types
from distmoe.config.ranges import RANGES
from distmoe.config.rules import FORCED_ROUTERS
from distmoe.registry import ROUTERS
from distmoe.routing.routers import is_forced

MakeConfig = Callable[..., Config]
MakeData = Callable[..., str]


def problems(config: Config, world: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(config, world)
    return caught.value.problems


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_right_config_passes(make_config: MakeConfig, world: int, ep: int) -> None:
    if world % ep == 0:
        check(make_config(f"--parallel.ep={ep}"), world)


def test_every_number_has_a_range() -> None:
    assert {key for key, kind in key_types().items() if kind in (int, float)} == set(RANGES)


@pytest.mark.parametrize("key", sorted(RANGES))
def test_numbers_out_of_range_are_named(make_config: MakeConfig, key: str) -> None:
    found = problems(make_config(f"--{key}=-3"))
    assert any(problem.startswith(f"{key} is -3") and "must be" in problem for problem in found)


@pytest.mark.parametrize("text", ["inf", "nan", "1.0"])
def test_open_ends_and_infinities_are_out(make_config: MakeConfig, text: str) -> None:
    (problem,) = problems(make_config(f"--optim.beta1={text}"))
    assert problem == f"optim.beta1 is {text}; it must be in [0, 1)"


@pytest.mark.parametrize("key", sorted(NAMES))
def test_unknown_names_list_the_known_ones(make_config: MakeConfig, key: str) -> None:
    registry, others = NAMES[key]
    known = [*others, *registry]
    near = known[-1] + "x"
    (problem,) = problems(make_config(f"--{key}={near}"))
    assert problem.startswith(f"{key} is '{near}'; it must be one of {', '.join(known)}")
    assert problem.endswith(f"; did you mean {known[-1]}?")


@pytest.mark.parametrize(
    ("options", "world", "expected"),
    [
        ("--moe.top_k=17", 1, "moe.top_k is 17; it must be in 1..moe.num_experts (16)"),
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
            "--moe.dispatch.exchange=local --parallel.ep=2",
            2,
            "moe.dispatch.exchange is local; it must be auto for parallel.ep 2",
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
            "--train.trace_steps=5-201",
            1,
            "train.trace_steps is 5-201; it must be empty or FIRST-LAST within 1..train.steps "
            "(200)",
        ),
        (
            "--train.trace_steps=5..7",
            1,
            "train.trace_steps is 5..7; it must be empty or FIRST-LAST within 1..train.steps (200)",
        ),
        (
            "--train.profile=0-3",
            1,
            "train.profile is 0-3; it must be empty or FIRST-LAST within 1..train.steps (200)",
        ),
        (
            "--train.profile_ranks=0,2",
            2,
            "train.profile_ranks is 0,2; it must be all, or ranks below the number of ranks (2) "
            "with commas between",
        ),
        (
            "--train.memory_snapshot=3 --run.device=cpu",
            1,
            "train.memory_snapshot is 3; it must be empty on the device cpu, whose allocator",
        ),
        (
            "--train.compile=dense --parallel.engine=deepspeed",
            2,
            "train.compile is dense; it must be none with parallel.engine 'deepspeed', whose ",
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
        ("--run.dir=Makefile", 1, "run.dir is Makefile; it must be a folder"),
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


@pytest.mark.parametrize(
    "options",
    [
        "--moe.expert_groups=4 --moe.groups_per_token=2",
        "--moe.expert_groups=1",
        "--moe.nodes_per_token=2 --parallel.ranks_per_node=2",
        # One node, or no more than a token may use: no limit, whatever top_k is.
        "--moe.nodes_per_token=1 --parallel.ranks_per_node=16",
        "--moe.nodes_per_token=8 --parallel.ranks_per_node=1 --moe.top_k=16",
        "--moe.router=balanced --moe.expert_groups=4 --moe.groups_per_token=1",
        "--moe.router=hash --moe.score_scale=2.5",
        "--moe.router=sigmoid_topk --moe.bias_update_rate=1e-3",
    ],
)
def test_limits_that_fit(make_config: MakeConfig, options: str) -> None:
    check(make_config(*options.split(), "--parallel.ep=8"), 8)


def test_the_check_knows_every_forced_router() -> None:
    assert set(FORCED_ROUTERS) == {name for name in ROUTERS if is_forced(name)}


def test_ranks_of_a_node_are_those_of_the_launcher(make_config: MakeConfig) -> None:
    config = make_config("--parallel.ep=8", "--moe.nodes_per_token=1")
    check(config, 8, local_world=8)
    check(config, 8, local_world=4)
    with pytest.raises(ConfigError, match="ranks_per_node is 3; it must divide"):
        check(config, 8, local_world=3)


def test_a_balanced_run_of_experts_touches_as_many_groups_as_the_rule_says() -> None:
    for num_experts, count, top_k in ((16, 4, 3), (12, 4, 2), (24, 3, 5), (16, 8, 4), (18, 6, 7)):
        size = num_experts // count
        most = max(
            len({(t * top_k + j) % num_experts // size for j in range(top_k)})
            for t in range(num_experts)
        )
        for per_token in range(1, count):
            moe = MoEConfig(
                num_experts=num_experts,
                top_k=top_k,
                router="balanced",
                expert_groups=count,
                groups_per_token=per_token,
            )
            found = list(expert_group_problems(moe, ep=1, ranks_per_node=0))
            assert any("balanced" in problem for problem in found) == (per_token < most)


def test_node_by_node_has_as_many_steps_as_wanted(make_config: MakeConfig) -> None:
    options = [f"--moe.dispatch.{option}" for option in ("level=node", "order=source", "steps=4")]
    check(make_config("--parallel.ep=2", *options), 2)


def test_rounding_none_needs_no_tile(make_config: MakeConfig) -> None:
    check(make_config("--moe.rounding.rule=none", "--moe.rounding.tile=1000000"), 1)


def test_missing_data_says_how_to_make_it() -> None:
    config = apply_overrides(Config(), ["--data.path", "no/data"])
    assert problems(config) == [
        "data.path is 'no/data'; no manifest.json there; make one with: "
        "distmoe data prepare INPUT --out no/data"
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"vocab_size": 5, "splits": {"train": 3}}'])
def test_broken_manifest(make_data: MakeData, text: str) -> None:
    folder = make_data()
    (Path(folder) / "manifest.json").write_text(text)
    (problem,) = problems(apply_overrides(Config(), ["--data.path", folder]))
    assert problem.startswith(f"data.path is '{folder}'; its manifest.json cannot be read (")


@pytest.mark.parametrize(
    ("split", "name", "needed"),
    [("train", "training", 16 * 256 + 1), ("validation", "validation", 8 * 16 * 256 + 1)],
)
def test_splits_must_be_long_enough(
    make_data: MakeData, split: str, name: str, needed: int
) -> None:
    config = apply_overrides(Config(), ["--data.path", make_data(**{split: needed})])
    check(config, 1)
    make_data(**{split: needed - 1})
    (problem,) = problems(config)
    assert problem.startswith(f"data.path is '{config.data.path}'; its {name} split has ")


def test_all_problems_are_reported_at_once(make_config: MakeConfig) -> None:
    config = make_config("--moe.top_k=99", "--optim.lr=0", "--moe.router=x", "--train.steps=5")
    starts = ["optim.lr is 0", "moe.router is 'x'", "moe.top_k is 99", "optim.warmup_steps is 20"]
    found = problems(config)
    assert [problem[: len(start)] for problem, start in zip(found, starts, strict=True)] == starts


def test_nothing_divides_by_a_number_out_of_range(make_config: MakeConfig) -> None:
    found = problems(make_config(*(f"--{key}=0" for key in RANGES)), 4)
    assert found
