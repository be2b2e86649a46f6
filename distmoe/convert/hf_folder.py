"""A folder of Hugging Face: config.json, and safetensors in one file or in several."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Small files that a model is used with.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def read_json(path: Path) -> dict[str, Any]:
    """ValueError if the file is missing or no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object")
    return found


class Weights:
    """The tensors of a folder, read one at a time. A context: files are open inside it.

    ValueError if a file that the index names is missing, or safetensors is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._files = _files(folder)
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Weights:
        for path in sorted(set(self._files.values())):
            self._open[path] = self._stack.enter_context(_safe_open(path))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self._open[self._files[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As config.json calls it, or safetensors, if it is none of ours."""
        code = str(self._open[self._files[name]].get_slice(name).get_dtype())
        return DTYPE_CODES.get(code, code)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self._files[name]].get_tensor(name)
        return tensor


def safetensors_room() -> Any:
    """The module; ValueError if it is not installed."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ValueError("safetensors is not installed: pip install 'distmoe[hf]'") from error
    return safetensors


def _files(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
        missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names")
        return {name: folder / file for name, file in weight_map.items()}
    path = folder / SINGLE
    if not path.is_file():
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")
    with _safe_open(path) as file:
        return dict.fromkeys(file.keys(), path)


def _safe_open(path: Path) -> Any:
    room = safetensors_room()
    try:
        return room.safe_open(path, framework="pt")
    except room.SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
