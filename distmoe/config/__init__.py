"""The whole run as frozen dataclasses, read from TOML and the command line, checked once."""

from distmoe.config.check import check
from distmoe.config.corpora import Corpus, corpora
from distmoe.config.errors import ConfigError
from distmoe.config.expert_groups import ExpertGroups, expert_group_problems, expert_groups
from distmoe.config.load import load_config, to_toml
from distmoe.config.model_schema import MlaConfig, ModelConfig, YarnConfig
from distmoe.config.moe_schema import DispatchConfig, MoEConfig, RoundingConfig
from distmoe.config.overrides import apply_overrides
from distmoe.config.resolve import resolve
from distmoe.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DeepSpeedConfig,
    LaunchConfig,
    MetricsConfig,
    OptimConfig,
    ParallelConfig,
    RankInfo,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "Corpus",
    "DataConfig",
    "DeepSpeedConfig",
    "DispatchConfig",
    "ExpertGroups",
    "LaunchConfig",
    "MetricsConfig",
    "MlaConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RankInfo",
    "RoundingConfig",
    "RunConfig",
    "TrainConfig",
    "YarnConfig",
    "apply_overrides",
    "check",
    "corpora",
    "expert_group_problems",
    "expert_groups",
    "load_config",
    "resolve",
    "to_toml",
]
