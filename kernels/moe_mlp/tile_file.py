"""Reads files of measured tile configurations, and refuses what cannot run.

TOML, as `tools/bench_moe.py --tune --write-tiles FILE` writes it: a [[layer]] for every backend,
shape and bucket of pairs, and in it a table for every kernel.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from math import inf
from pathlib import Path
from typing import Any

import torch

from distmoe.kernels.moe_mlp.tile_table import (
    Origin,
    TileTable,
    TunedLayer,
    TunedTile,
    bucket_of,
)
from distmoe.kernels.moe_mlp.tiles import ExpertShape, TileConfig, TileSpace
from distmoe.registry import MOE_MLP_TILES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""fp32 has one configuration, for parity tests."""
LARGEST = 512
WARPS = (1, 2, 4, 8, 16)


class TileFileError(ValueError):
    """A file of tiles cannot be used; the message names it, the entry, the value and what is
    allowed."""


@dataclass(frozen=True)
class TileFile:
    """``device``: as the driver calls it."""

    device: str
    layers: tuple[TunedLayer, ...]

    def table(self, backend: str) -> TileTable:
        """What it has for ``backend``."""
        return TileTable(self.device, (one for one in self.layers if one.backend == backend))


def read_tiles(path: str | Path) -> TileFile:
    """A file of tiles, whatever the device; TileFileError for one that is wrong."""
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TileFileError(f"'{path}' cannot be read: {error}") from error
    return _Reader(str(path)).file(content)


class _Reader:
    """Turns TOML into a TileFile, and names the first thing that is wrong."""

    def __init__(self, path: str) -> None:
        self._path = path

    def file(self, content: Mapping[str, Any]) -> TileFile:
        self._check_keys("the file", content, ("device", "layer"))
        device = self._text("the file", content, "device")
        tables = content.get("layer", [])
        if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
            raise self._wrong("the file", "layer", tables, "be tables, [[layer]]")
        layers = [self._layer(f"layer {i}", one) for i, one in enumerate(tables, start=1)]
        first: dict[object, int] = {}
        for i, layer in enumerate(layers, start=1):
            if layer.key in first:
                raise TileFileError(
                    f"layer {i} ({layer}) in '{self._path}' is there twice, first as layer "
                    f"{first[layer.key]}; it must be there once"
                )
            first[layer.key] = i
        return TileFile(device, tuple(layers))

    def _layer(self, where: str, table: Mapping[str, Any]) -> TunedLayer:
        backend = self._among(where, table, "backend", tuple(MOE_MLP_TILES))
        dtype = DTYPES[self._among(where, table, "dtype", tuple(DTYPES))]
        H, I, e, pairs = (self._count(where, table, key) for key in ("H", "I", "e", "pairs"))
        shape = ExpertShape(H, I, e, self._flag(where, table, "gated"), dtype)
        if table.get("bucket") != bucket_of(pairs):
            allowed = f"be {bucket_of(pairs)}, the power of two nearest to pairs ({pairs})"
            raise self._wrong(where, "bucket", table.get("bucket", "missing"), allowed)
        own = [field.name for field in fields(Origin)]
        origin = Origin(**{key: self._text(where, table, key) for key in own})
        known = ("backend", "dtype", "H", "I", "e", "gated", "pairs", "bucket", *own)
        space: TileSpace = MOE_MLP_TILES.load(backend)
        tiles = {}
        for kernel, entry in table.items():
            if isinstance(entry, dict):
                name = f"{where} ({backend} {shape} bucket {bucket_of(pairs)}), {kernel}"
                if kernel not in space.candidates:
                    raise self._wrong(name, "the kernel", kernel, _one_of(tuple(space.candidates)))
                tiles[kernel] = self._tile(name, entry)
                if problem := space.check(kernel, tiles[kernel].config):
                    raise TileFileError(f"{name} in '{self._path}': {problem}")
        self._check_keys(where, {k: v for k, v in table.items() if k not in tiles}, known)
        return TunedLayer(backend, shape, pairs, tiles, origin)

    def _tile(self, where: str, table: Mapping[str, Any]) -> TunedTile:
        own = fields(TileConfig)
        figures = ("ms", "default_ms", "spread_ms")
        self._check_keys(where, table, (*(field.name for field in own), *figures))
        values: dict[str, Any] = {}
        for field in own:
            if field.name in table or field.default is MISSING:
                is_flag = isinstance(field.default, bool)
                read = self._flag if is_flag else self._count
                values[field.name] = read(where, table, field.name)
        config = TileConfig(**values)
        self._check_tile(where, config)
        return TunedTile(config, *(self._number(where, table, key) for key in figures))

    def _check_tile(self, where: str, config: TileConfig) -> None:
        for key in ("m", "n", "k"):
            size = getattr(config, key)
            if size & (size - 1) or not 16 <= size <= LARGEST:
                raise self._wrong(where, key, size, f"be a power of two in [16, {LARGEST}]")
        if config.num_warps not in WARPS:
            raise self._wrong(where, "num_warps", config.num_warps, _one_of(WARPS))
        if config.chunks & (config.chunks - 1) or config.chunks > config.n // 16:
            allowed = f"be a power of two, at most n / 16 ({config.n // 16})"
            raise self._wrong(where, "chunks", config.chunks, allowed)

    def _text(self, where: str, table: Mapping[str, Any], key: str) -> str:
        value = table.get(key)
        if not isinstance(value, str):
            raise self._wrong(where, key, table.get(key, "missing"), "be a string")
        return value

    def _among(self, where: str, table: Mapping[str, Any], key: str, known: tuple[str, ...]) -> str:
        value = table.get(key, "missing")
        if not isinstance(value, str) or value not in known:
            raise self._wrong(where, key, value, _one_of(known))
        return value

    def _flag(self, where: str, table: Mapping[str, Any], key: str) -> bool:
        value = table.get(key, "missing")
        if not isinstance(value, bool):
            raise self._wrong(where, key, value, "be true or false")
        return value

    def _count(self, where: str, table: Mapping[str, Any], key: str) -> int:
        value = table.get(key, "missing")
        # A bool is an int to isinstance.
        if type(value) is not int or value < 1:
            raise self._wrong(where, key, value, "be an integer, at least 1")
        return value

    def _number(self, where: str, table: Mapping[str, Any], key: str) -> float:
        value = table.get(key, "missing")
        # The difference of two times may be less than nothing.
        if type(value) not in (int, float) or not -inf < value < inf:
            raise self._wrong(where, key, value, "be a number")
        return float(value)

    def _check_keys(self, where: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for key, value in table.items():
            if key not in known:
                raise self._wrong(where, "an unknown key", f"{key} = {value}", _one_of(known))

    def _wrong(self, where: str, key: str, value: object, allowed: str) -> TileFileError:
        return TileFileError(f"{where} in '{self._path}': {key} is {value!r}; it must {allowed}")


def _one_of(known: tuple[object, ...]) -> str:
    return f"be one of {', '.join(map(str, known))}"
