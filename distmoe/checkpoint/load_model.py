"""The whole model of a checkpoint in this process."""

from __future__ import annotations

from pathlib import Path

import torch

from distmoe.checkpoint.layouts import DERIVED, run_config
from distmoe.checkpoint.load import MODEL, load
from distmoe.checkpoint.manifest import read_manifest
from distmoe.config import Config, resolve
from distmoe.config.keys import with_values
from distmoe.model.transformer import Transformer

ONE_RANK = {
    **DERIVED,
    "parallel.engine": "single",
    "parallel.ep": 1,
    "parallel.cp": 1,
    "parallel.dp_replicate": 1,
    "moe.dispatch.exchange": "auto",
    "moe.nodes_per_token": 0,
    # What this machine computes in; the run's may have had other devices.
    "train.dtype": "auto",
}


def load_model(path: Path, device: torch.device) -> tuple[Config, Transformer]:
    """The settings of the run, for one rank, and its model in evaluation, fp32, with all experts.

    Tokens may choose from all nodes. ValueError if the checkpoint is not one of this version.
    """
    config = resolve(with_values(run_config(read_manifest(path)), ONE_RANK), 1)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device=device)
    model.tie()
    load(path, {MODEL: {**dict(model.named_parameters()), **dict(model.named_buffers())}})
    return config, model.eval()
