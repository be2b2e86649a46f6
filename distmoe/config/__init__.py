"""The whole run as frozen dataclasses, read from TOML and the command line, checked once."""

from distmoe.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DispatchConfig,
    LaunchConfig,
    MetricsConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    RankInfo,
    RoundingConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DispatchConfig",
    "LaunchConfig",
    "MetricsConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RankInfo",
    "RoundingConfig",
    "RunConfig",
    "TrainConfig",
]
