"""A checkpoint as a model of Hugging Face."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distmoe.checkpoint.layouts import run_config
from distmoe.checkpoint.load import MODEL
from distmoe.checkpoint.manifest import damage, read_manifest
from distmoe.checkpoint.tensors import in_parts, read_tensors, saved_tensors
from distmoe.config import Config
from distmoe.convert.architecture import Architecture, architecture_called
from distmoe.convert.hf_config import hf_config_of
from distmoe.convert.hf_folder import (
    COMPANIONS,
    CONFIG,
    DTYPES,
    INDEX,
    SINGLE,
    read_json,
    safetensors_room,
)
from distmoe.convert.names import sources_of
from distmoe.convert.router_bias import bias_to_hf, is_bias


@dataclass(frozen=True)
class Origin:
    """A model of Hugging Face: its config.json, the folder of its tokenizer, its weights' dtype."""

    hf: Mapping[str, Any] | None = None
    folder: Path | None = None
    dtype: str = ""


def export_model(
    path: Path,
    out: Path,
    *,
    like: Path | None = None,
    model_type: str = "",
    dtype: str = "",
    max_bytes: int = 5 << 30,
) -> list[Path]:
    """Write the model of checkpoint ``path`` to the new folder ``out``; its files.

    Keys of config.json that no setting decides, and the tokenizer, are those of the model that was
    imported, whether by this checkpoint or by the one with whose weights its run began, or of the
    folder ``like``. ``dtype``: of DTYPES; empty: of the imported model, else float32.
    ``model_type``: see `hf_config_of`. A file has at most ``max_bytes`` of our tensors, unless one
    is larger; as much is in memory, and twice the largest tensor. ValueError, a line for every
    problem, before anything is written.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name a new folder")
    if lines := damage(path):
        raise ValueError(f"{path} is damaged: {'; '.join(lines)}")
    config = run_config(read_manifest(path))
    origin = Origin(read_json(like / CONFIG), like) if like else _imported(path, config)
    hf = hf_config_of(config, source=origin.hf, model_type=model_type)
    if dtype or not origin.dtype:
        hf["torch_dtype" if "torch_dtype" in hf else "dtype"] = dtype or "float32"
    dtype = dtype or origin.dtype or "float32"
    beside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    _write_weights(path, beside, hf, config, DTYPES[dtype], max_bytes)
    (beside / CONFIG).write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n")
    for name in COMPANIONS:
        if origin.folder is not None and (origin.folder / name).is_file():
            shutil.copy(origin.folder / name, beside / name)
    beside.rename(out)
    return sorted(out.iterdir())


def _imported(path: Path, config: Config) -> Origin:
    """The model with which the weights began."""
    for candidate in (path, Path(config.checkpoint.init_from)):
        if (candidate / "manifest.json").is_file():
            about = read_manifest(candidate).about
            if "hf_config" in about:
                return Origin(
                    about["hf_config"], candidate.absolute().parents[1], about["hf_dtype"]
                )
    return Origin()


def _write_weights(
    path: Path, out: Path, hf: dict[str, Any], config: Config, dtype: torch.dtype, max_bytes: int
) -> None:
    save_file = safetensors_room().torch.save_file
    architecture = architecture_called(hf["model_type"])
    wanted = saved_tensors(path, MODEL)
    parts = list(in_parts(wanted, max_bytes))
    files: dict[str, str] = {}
    size = 0
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if parts[1:] else SINGLE
        tensors = {}
        for saved in part:
            name = saved.name.removeprefix(f"{MODEL}.")
            sources = sources_of(name, architecture, num_experts=config.moe.num_experts)
            (whole,) = read_tensors(path, [saved]).values()
            if is_bias(name):
                whole = bias_to_hf(whole)
            for source, view in sources.parts(whole):
                # safetensors wants memory that is not shared.
                tensors[source] = view.to(whole.dtype if is_bias(name) else dtype, copy=True)
        if number == 1:
            tensors |= _biases_of_none(architecture, config)
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, out / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    if parts[1:]:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _biases_of_none(architecture: Architecture, config: Config) -> dict[str, torch.Tensor]:
    """Zeros, where the architecture has biases and the model has none."""
    templates = architecture.names.get("blocks.{layer}.mlp.bias_E", ())
    if config.moe.bias_update_rate > 0:
        return {}
    return {
        template.format(layer=layer): torch.zeros(config.moe.num_experts)
        for layer in range(config.model.n_dense_layers, config.model.n_layers)
        for template in templates
    }
