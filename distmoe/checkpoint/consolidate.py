"""A checkpoint as whole tensors in safetensors files, as other programs read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from distmoe.checkpoint.manifest import read_manifest
from distmoe.checkpoint.tensors import in_parts, read_tensors, saved_tensors

STEM = "model"


def consolidate(
    path: Path, out: Path, *, optimizer: bool = False, max_bytes: int = 5 << 30
) -> list[Path]:
    """Write the model of checkpoint ``path`` to the new folder ``out``; the files.

    Names are those of the model; with ``optimizer`` also ``optimizer.NAME.exp_avg`` and so on. No
    more than ``max_bytes`` of tensors are in memory at one time, or in one file, unless a single
    tensor is larger. Several files get an index as Hugging Face writes it. The run's settings lie
    beside them as config.toml. ValueError if ``out`` exists or safetensors is not installed.
    """
    save_file = _save_file()
    if out.exists():
        raise ValueError(f"{out} exists; name a new folder")
    wanted = saved_tensors(path, "model") + (saved_tensors(path, "optimizer") if optimizer else [])
    parts = list(in_parts(wanted, max_bytes))
    manifest = read_manifest(path)
    facts = {"format": "pt", "step": str(manifest.step)}
    beside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"{STEM}-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else STEM
        tensors = {_name(key): tensor for key, tensor in read_tensors(path, part).items()}
        save_file(tensors, beside / f"{file}.safetensors", metadata=facts)
        weight_map |= dict.fromkeys(tensors, f"{file}.safetensors")
    if len(parts) > 1:
        total = sum(tensor.bytes for tensor in wanted)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (beside / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (beside / "config.toml").write_text(str(manifest.about.get("config", "")))
    beside.rename(out)
    return sorted(out.iterdir())


def _save_file() -> Any:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ValueError("safetensors is not installed: pip install 'distmoe[hf]'") from error
    return save_file


def _name(key: str) -> str:
    return key.removeprefix("model.")
