"""A model of Hugging Face as a checkpoint of step 0, from whose weights a run begins."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor

from distmoe import __version__
from distmoe.checkpoint.lazy_tensors import LazyTensors
from distmoe.checkpoint.load import MODEL
from distmoe.checkpoint.store import CheckpointStore
from distmoe.config import Config, ConfigError, resolve, to_toml
from distmoe.config.keys import with_values
from distmoe.convert.architecture import architecture_called
from distmoe.convert.hf_config import settings_of
from distmoe.convert.hf_folder import COMPANIONS, CONFIG, DTYPES, Weights, read_json
from distmoe.convert.names import Sources, sources_of
from distmoe.convert.router_bias import bias_from_hf, bias_problem, is_bias
from distmoe.model.transformer import Transformer

STEP = "step-00000000"
# With its number in the model.
HF_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def import_model(folder: Path, out: Path, *, say: Callable[[str], None] = print) -> Path:
    """Write the model of ``folder`` to the new folder ``out``; the checkpoint in it.

    Beside the checkpoint lie config.toml, with the model's sizes, for `distmoe train`, and the
    tokenizer. Weights become fp32. One tensor of ours, at most the experts of a layer, is in
    memory at one time. ``say`` is told what is left out. ValueError, a line for every problem,
    before anything is written.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name a new folder")
    hf = read_json(folder / CONFIG)
    settings = settings_of(hf)
    config = resolve(with_values(Config(), settings), 1)
    wanted = tensors_of(config)
    sources = {name: _sources(name, hf, config) for name in wanted}
    beside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(beside, ignore_errors=True)
    with Weights(folder) as weights:
        further = _further_layers(weights, hf)
        _check(weights, wanted, sources, left_out=further)
        if further:
            say(f"left out: {len(further)} tensors of layers that predict further tokens")

        def make(key: str) -> Tensor:
            name = key.removeprefix(f"{MODEL}.")
            full = torch.empty(wanted[name].shape)
            for source, part in sources[name].parts(full):
                part.copy_(weights.read(source))
            return bias_from_hf(full) if is_bias(name) else full

        facts = {"config": to_toml(config), "hf_config": hf, "hf_dtype": _widest(weights, sources)}
        _save(beside, wanted, make, facts)
    for name in COMPANIONS:
        if (folder / name).is_file():
            shutil.copy(folder / name, beside / name)
    path = out / "checkpoints" / STEP
    (beside / "config.toml").write_text(_run_toml(settings, out, path))
    beside.rename(out)
    return path


def tensors_of(config: Config) -> dict[str, Tensor]:
    """Parameters and biases of a resolved run's model on the meta device: shapes without memory."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: p.detach() for name, p in (*model.named_parameters(), *model.named_buffers())}


def _further_layers(weights: Weights, hf: Mapping[str, Any]) -> set[str]:
    """Tensors of the layers after the last one, which predict further tokens."""
    first = int(hf["num_hidden_layers"])
    last = first + int(hf.get("num_nextn_predict_layers") or 0)
    layers = {name: HF_LAYER.match(name) for name in weights.names()}
    return {name for name, layer in layers.items() if layer and first <= int(layer[1]) < last}


def _sources(name: str, hf: Mapping[str, Any], config: Config) -> Sources:
    architecture = architecture_called(hf["model_type"])
    return sources_of(name, architecture, num_experts=config.moe.num_experts)


def _check(
    weights: Weights,
    wanted: dict[str, Tensor],
    sources: dict[str, Sources],
    *,
    left_out: set[str],
) -> None:
    """ConfigError for tensors that are missing, of another shape, or without a place, and for
    biases that are too far apart."""
    problems, left = [], weights.names() - left_out
    for name, tensor in wanted.items():
        for source, part in sources[name].parts(tensor):
            if source not in left:
                problems.append(f"{source} is missing; it is needed for {name}")
            elif weights.shape(source) != tuple(part.shape):
                shape = weights.shape(source)
                problems.append(f"{source} is {shape}; by config.json it must be {(*part.shape,)}")
            elif (dtype := weights.dtype(source)) not in DTYPES:
                problems.append(f"{source} is {dtype}; it must be one of {', '.join(DTYPES)}")
            elif is_bias(name) and (problem := bias_problem(weights.read(source))):
                problems.append(f"{source} {problem}")
            left.discard(source)
    # Transformers computes it, but some old files have it.
    left = {name for name in left if not name.endswith("rotary_emb.inv_freq")}
    if "embedding.weight" in wanted and "head.weight" not in wanted:
        left.discard("lm_head.weight")
    problems += [f"{name} has no place in the model" for name in sorted(left)]
    if problems:
        more = [f"and {len(problems) - 10} more such tensors"] if len(problems) > 10 else []
        raise ConfigError(problems[:10] + more)


def _widest(weights: Weights, sources: Mapping[str, Sources]) -> str:
    """The dtype that holds all parameters; config.json may name another than they have."""
    dtypes = {
        weights.dtype(name)
        for ours, found in sources.items()
        if not is_bias(ours)
        for names_j in found.names_ej
        for name in names_j
    }
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _save(root: Path, wanted: dict[str, Tensor], make: Any, facts: dict[str, Any]) -> None:
    about = {"distmoe": __version__, "world": 1, "engine": "import", "ep": 1, **facts}
    store = CheckpointStore(
        root / "checkpoints", group=None, keep_last=1, asynchronous=False, about=about
    )
    store.save(0, {MODEL: wanted, "progress": {"done": 0}}, planner=LazyTensors(make))
    for report in store.reports():
        if report.error:
            raise OSError(f"the checkpoint could not be written: {report.error}")


def _run_toml(settings: Mapping[str, Any], out: Path, checkpoint: Path) -> str:
    """The settings of a run that begins with the weights; only those that are not defaults."""
    run = {
        "run.name": out.name,
        "run.dir": f"runs/{out.name}",
        "checkpoint.init_from": str(checkpoint.absolute()),
    }
    tables: dict[str, Any] = {}
    for key, value in {**run, **settings}.items():
        *sections, name = key.split(".")
        table = tables
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return tomli_w.dumps(tables)
