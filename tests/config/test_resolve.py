from collections.abc import Callable
from dataclasses import replace

import pytest

from distmoe.config import (
    Config,
    DataConfig,
    apply_overrides,
    check,
    load_config,
    resolve,
    to_toml,
)
from distmoe.config.batch import data_ranks, micro_batches, rank_tokens
from distmoe.config.dtype import with_dtype

MakeConfig = Callable[..., Config]


def test_derived_values(make_config: MakeConfig) -> None:
    config = resolve(make_config("--model.hidden_size", "96", "--parallel.dp_replicate", "2"), 8)
    assert config.moe.hidden_size == 96
    assert config.model.head_dim == 24
    assert config.model.vocab_size == 512
    assert config.parallel.dp_shard == 4
    assert config.parallel.engine == "fsdp2"
    assert config.train.micro_batch_size == 2
    assert config.moe.kernel == "auto"


def test_ranks_that_share_sequences_have_a_larger_batch_together(make_config: MakeConfig) -> None:
    config = resolve(make_config("--parallel.cp", "4"), 8)
    assert config.train.micro_batch_size == 8
    assert (micro_batches(config, 8), data_ranks(config, 8)) == (1, 2)
    assert rank_tokens(config) == 2 * config.data.seq_len


def test_values_that_are_set_stay(make_config: MakeConfig) -> None:
    options = ["--model.head_dim=8", "--model.vocab_size=600", "--parallel.engine=fsdp2"]
    config = resolve(make_config(*options, "--train.micro_batch_size=1"), 1)
    assert (config.model.head_dim, config.model.vocab_size) == (8, 600)
    assert (config.parallel.engine, config.train.micro_batch_size) == ("fsdp2", 1)


def test_ranks_are_those_of_this_machine_by_default(make_config: MakeConfig) -> None:
    config = make_config("--launch.nproc", "4")
    assert resolve(config) == resolve(config, 4)
    assert resolve(config, 1).parallel.engine == "single"


def test_ranks_of_a_node(make_config: MakeConfig) -> None:
    config = make_config("--launch.nproc", "4")
    assert resolve(config, 8, local_world=2).parallel.ranks_per_node == 2
    assert resolve(config).parallel.ranks_per_node == 4
    assert resolve(config, 8).parallel.ranks_per_node == 0
    given = make_config("--parallel.ranks_per_node", "8")
    assert resolve(given, 8, local_world=2).parallel.ranks_per_node == 8


def test_what_cannot_be_derived_stays_unset() -> None:
    config = resolve(replace(Config(), data=DataConfig(path="no/such/folder")), 3)
    assert config.model.vocab_size == 0
    assert config.train.micro_batch_size == 0


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_twice_is_once_and_a_saved_run_is_the_same(
    make_config: MakeConfig, world: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = resolve(make_config(), world)
    assert resolve(config, world) == config
    path = tmp_path_factory.mktemp("saved") / "config.toml"
    path.write_text(to_toml(config))
    assert load_config(path) == config
    check(config, world)


@pytest.mark.parametrize(
    ("device_type", "asked", "found"),
    [("cuda", "auto", "bf16"), ("cpu", "auto", "fp32"), ("cuda", "fp32", "fp32")],
)
def test_the_dtype_follows_the_device(device_type: str, asked: str, found: str) -> None:
    config = apply_overrides(Config(), [f"--train.dtype={asked}"])
    assert with_dtype(config, device_type).train.dtype == found
