"""Files of measured tile configurations: what is refused, and which one a device uses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tile_tables import SMALL, layer_of, table_file

from distmoe.bench.kernels.tuning import write_tiles
from distmoe.kernels import moe_mlp
from distmoe.kernels.moe_mlp import find_tiles as finding
from distmoe.kernels.moe_mlp.find_tiles import check_shared_memory, find_tiles, shipped_file
from distmoe.kernels.moe_mlp.tile_file import TileFile, TileFileError, read_tiles
from distmoe.kernels.moe_mlp.tiles import ExpertShape, TileConfig
from distmoe.registry import MOE_MLP_TILES

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
ENTRY = "layer 1 (triton H32 I16 e2 gated float16 bucket 64), up in FILE"
# What is changed in a right file, and what is said then.
WRONG = {
    "no TOML": ('device = "cpu"', "device =", "FILE cannot be read: Invalid value"),
    "device": ('device = "cpu"', "", "the file in FILE: device is 'missing'; it must be a string"),
    "key of the file": (
        'device = "cpu"',
        'name = "cpu"',
        "the file in FILE: an unknown key is 'name = ",
    ),
    "backend": (
        '"triton"',
        '"cuda"',
        "layer 1 in FILE: backend is 'cuda'; it must be one of triton",
    ),
    "kernel": ("[layer.up]", "[layer.upp]", "the kernel is 'upp'; it must be one of up, down, "),
    "dtype": ('"float16"', '"float32"', "dtype is 'float32'; it must be one of bfloat16, float16"),
    "size": ("H = 32", "H = 0", "layer 1 in FILE: H is 0; it must be an integer, at least 1"),
    "gated": ("gated = true", "gated = 1", "layer 1 in FILE: gated is 1; it must be true or false"),
    "bucket": ("bucket = 64", "bucket = 32", "bucket is 32; it must be 64, the power of two"),
    "key": ("date =", "day =", "layer 1 in FILE: date is 'missing'; it must be a string"),
    "unknown key": ("pairs = 64", "pairs = 64\nL = 3", "an unknown key is 'L = 3'; it must be one"),
    "tile": ("m = 16", "m = 48", f"{ENTRY}: m is 48; it must be a power of two in [16, 512]"),
    "warps": ("num_warps = 4", "num_warps = 3", f"{ENTRY}: num_warps is 3; it must be one of 1, "),
    "chunks": ("chunks = 1", "chunks = 2", f"{ENTRY}: chunks is 2; it must be a power of two, at"),
    "odd chunks": (
        "n = 16\nk = 16\nnum_warps = 4\nnum_stages = 2\nchunks = 1",
        "n = 64\nk = 16\nnum_warps = 4\nnum_stages = 2\nchunks = 3",
        f"{ENTRY}: chunks is 3; it must be a power of two, at most n / 16 (4)",
    ),
    "stages": ("num_stages = 2", "", f"{ENTRY}: num_stages is 'missing'; it must be an integer"),
    "key of a tile": ("m = 16", "m = 16\nx = 1", f"{ENTRY}: an unknown key is 'x = 1'; it must be"),
    "figure": ("ms = 1.0", "ms = inf", f"{ENTRY}: ms is inf; it must be a number"),
}


@pytest.mark.parametrize(("right", "wrong", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, right: str, wrong: str, words: str) -> None:
    path = table_file(tmp_path / "tiles.toml")
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong, 1))
    with pytest.raises(TileFileError, match=re.escape(words.replace("FILE", f"'{path}'"))):
        read_tiles(path)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (TileConfig(128, 128, 64, 8, 1), "num_stages is 1; it must be at least 2"),
        (TileConfig(128, 128, 64, 2, 3), "num_warps is 2; it must be one of 4, 8"),
        (TileConfig(32, 128, 64, 4, 3), "m is 32; it must be a multiple of 16 * num_warps (64)"),
        (TileConfig(64, 128, 64, 8, 3), "m is 64; it must be a multiple of 16 * num_warps (128)"),
        (TileConfig(128, 64, 128, 4, 3), "k is 128; it must be at most 64"),
        (TileConfig(128, 128, 64, 8, 3, tma=False), "tma is False; it must be True: these"),
    ],
    ids=str,
)
def test_what_would_hang_not_compile_or_be_ignored_is_refused(
    tmp_path: Path, config: TileConfig, problem: str
) -> None:
    path = tmp_path / "tiles.toml"
    layer = layer_of({"up": config}, pairs=64)
    write_tiles(path, "cpu", [layer])
    # Only specialised warps need it.
    read_tiles(path)
    write_tiles(path, "cpu", [replace(layer, backend="gluon")])
    with pytest.raises(TileFileError, match=re.escape(f", up in '{path}': {problem}")):
        read_tiles(path)


def test_an_entry_is_there_once(tmp_path: Path) -> None:
    path = table_file(tmp_path / "tiles.toml")
    text = path.read_text()
    path.write_text(text + "\n" + text.partition("\n\n")[2].replace("pairs = 64", "pairs = 65"))
    with pytest.raises(TileFileError, match="layer 2 .* is there twice, first as layer 1"):
        read_tiles(path)


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    path = table_file(tmp_path / "tiles.toml")
    path.write_text(path.read_text().replace("chunks = 1\ntma = true\n", ""))
    (layer,) = read_tiles(path).layers
    assert layer.tiles["up"].config == SMALL


def test_too_much_shared_memory_is_refused() -> None:
    shape = ExpertShape(H=1536, I=256, e=8, gated=True, dtype=torch.bfloat16)
    tiles = {"down": TileConfig(128, 128, 64, 4, 3), "up": TileConfig(128, 256, 64, 8, 3)}
    found = TileFile("NVIDIA H200", (layer_of(tiles, pairs=64, shape=shape),))
    check_shared_memory(found, Path("x.toml"), most=245_760)
    with pytest.raises(
        TileFileError,
        match=r"triton H1536 .* bucket 64, up in 'x.toml': 128x256x64 w8 s3 needs 245760 bytes of "
        "shared memory; it must be at most 232448",
    ):
        check_shared_memory(found, Path("x.toml"), most=232_448)
    # Tiles that are wider than the result are made narrower.
    narrow = TileFile("", (layer_of(tiles, pairs=64, shape=shape._replace(I=128)),))
    check_shared_memory(narrow, Path("x.toml"), most=147_456)


TILE = r"(?P<tile>\d+x\d+x\d+ w\d+ s\d+)(?: c(?P<chunks>\d+))?(?P<pointers> ptr)?"
CASES_OF = {
    "triton": rf"(?P<kernel>\w+) H(?P<H>\d+) I(?P<I>\d+) (?P<activation>\w+) bf16 {TILE}",
    "gluon": rf"gluon (?P<kernel>\w+) {TILE}, (?P<H>\d+)x(?P<I>\d+) (?P<activation>\w+) bf16",
}


def published(backend: str, triton: str) -> Iterator[tuple[str, TileConfig, ExpertShape, int]]:
    """Products of 16-bit operands that were compiled for sm_90, with the bytes that they take."""
    path = ROOT / f"docs/benchmarks/kernels-sm_90-triton-{triton}.json"
    for case in json.loads(path.read_text())["cases"]:
        if found := re.fullmatch(CASES_OF[backend], case["case"]):
            sizes = map(int, re.findall(r"\d+", found["tile"]))
            config = TileConfig(*sizes, int(found["chunks"] or 1), tma=not found["pointers"])
            gated = found["activation"].endswith("glu")
            shape = ExpertShape(int(found["H"]), int(found["I"]), 1, gated, torch.bfloat16)
            yield found["kernel"], config, shape, case["shared"]


@pytest.mark.parametrize("triton", ["3.6", "3.9"])
@pytest.mark.parametrize("backend", list(MOE_MLP_TILES))
def test_needed_shared_memory_is_what_the_compiler_took(backend: str, triton: str) -> None:
    space = MOE_MLP_TILES.load(backend)
    cases = list(published(backend, triton))
    assert {kernel for kernel, *_ in cases} == set(space.candidates)
    for kernel, config, shape, shared in cases:
        needed = space.shared_bytes(kernel, config, shape)
        assert needed <= shared <= needed + 1024, (kernel, config, shape)


def test_a_user_names_a_file_of_this_device(tmp_path: Path) -> None:
    path = str(table_file(tmp_path / "tiles.toml"))
    assert len(find_tiles(path, "triton", CPU)) == 1
    # Matrix products have no tiles, whatever is named.
    assert len(find_tiles(path, "torch", CPU)) == 0
    other = str(table_file(tmp_path / "other.toml", device="NVIDIA H100"))
    with pytest.raises(TileFileError, match=r"'NVIDIA H100' in '.*'; it must be this .* 'cpu'"):
        find_tiles(other, "triton", CPU)
    assert len(find_tiles(other, "torch", CPU)) == 0


def test_a_file_is_checked_against_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SMALL: two buffers of 16 rows and of twice 16 columns, 16 long.
    path = table_file(tmp_path / "tiles.toml")
    monkeypatch.setattr(finding, "shared_memory", lambda device: 3071)
    with pytest.raises(TileFileError, match=r"needs 3072 bytes .* it must be at most 3071"):
        find_tiles(str(path), "triton", CPU)


def test_the_table_that_ships_for_a_device_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "SHIPPED", tmp_path / "nothing")
    find_tiles.cache_clear()
    assert len(find_tiles("auto", "triton", CPU)) == 0
    monkeypatch.setattr(finding, "SHIPPED", tmp_path)
    find_tiles.cache_clear()
    assert len(find_tiles("auto", "triton", CPU)) == 0
    table_file(tmp_path / "cpu.toml")
    find_tiles.cache_clear()
    assert len(find_tiles("auto", "triton", CPU)) == 1
    assert len(find_tiles("default", "triton", CPU)) == 0
    find_tiles.cache_clear()
    assert shipped_file("NVIDIA H100 80GB HBM3").name == "NVIDIA-H100-80GB-HBM3.toml"


def test_tables_that_ship_can_be_used() -> None:
    folder = Path(moe_mlp.__file__).parent / "tuned"
    assert (folder / "README.md").exists()
    for path in folder.glob("*.toml"):
        found = read_tiles(path)
        assert shipped_file(found.device) == finding.SHIPPED / path.name
        check_shared_memory(found, path, most=227 * 1024)
