"""Machines by name and from a file, and the rates that a plan takes from them."""

from dataclasses import replace
from pathlib import Path

import pytest

from distmoe.config import Config, ConfigError, RunConfig, TrainConfig
from distmoe.metrics.flops import peak_flops
from distmoe.planner.expert_rate import EXPERT_EFFICIENCY, expert_flops
from distmoe.planner.hardware import (
    DENSE_EFFICIENCY,
    KNOWN,
    dtype_on,
    find_hardware,
    on_hardware,
)
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import PRESETS, Link, Origin, Profile, save_profile
from distmoe.planner.roofline import DEVICE_SPEEDS, LayerSize, layer_floor_s

MEASURED = Profile(
    links={"own": Link(1e-6, 1e9), "remote": Link(1e-4, 1e7)},
    gemm_flops={"fp32": 2e10},
    host_latency_s=3e-5,
    origin=Origin(device="a slow one"),
    dense_flops={"fp32": 4e10},
    attention_flops={"fp32": 1e10},
    memory_bytes=2**30,
    ranks_per_node=1,
)
SHAPE = LayerShape(24576, hidden=1536, intermediate=256, num_experts=128, top_k=8)


@pytest.mark.parametrize("name", KNOWN)
def test_known_machines_have_all_that_a_plan_needs(name: str) -> None:
    hardware = find_hardware(name.upper())
    assert hardware.profile is PRESETS[KNOWN[name]]
    assert hardware.peak_flops == peak_flops(KNOWN[name])
    assert hardware.ranks_per_node == 8
    assert hardware.memory_bytes > 79 * 2**30
    # Nothing reaches the peak of the data sheet.
    peak = hardware.peak_flops
    assert peak is not None
    for flops in (
        hardware.dense_flops("bf16"),
        hardware.attention_flops("bf16"),
        expert_flops(hardware.profile, SHAPE, 1),
    ):
        assert 0.2 * peak < flops < 0.8 * peak


def test_experts_of_a_known_machine_run_at_a_share_of_the_roofline() -> None:
    """The floor of this layer is 0.882 ms forward and 1.422 ms backward (test_roofline.py)."""
    flops = 18 * 24576 * 8 * 1536 * 256
    expected = EXPERT_EFFICIENCY * flops / (0.882e-3 + 1.422e-3)
    hardware = find_hardware("h100")
    assert expert_flops(hardware.profile, SHAPE, 1) == pytest.approx(expected, rel=2e-3)
    # Few rows an expert: their weights are read for little.
    assert expert_flops(hardware.profile, replace(SHAPE, num_tokens=256), 1) < 0.5 * expected


def test_rows_of_spread_experts_are_those_that_tokens_have() -> None:
    """With one expert a token has one row, wherever it is; alone on its rank each of the eight has
    its own."""
    hardware, one = find_hardware("h100"), replace(SHAPE, top_k=1)
    assert expert_flops(hardware.profile, one, 16) > expert_flops(hardware.profile, one, 1)
    pairs = 8 * 24576
    size = LayerSize(rows=pairs, pairs=pairs, experts=1, hidden=1536, intermediate=256)
    floor_s = layer_floor_s(size, DEVICE_SPEEDS[KNOWN["h100"]])
    expected = EXPERT_EFFICIENCY * 18 * pairs * 1536 * 256 / floor_s
    assert expert_flops(hardware.profile, SHAPE, 128) == pytest.approx(expected)


def test_rates_of_a_measured_profile_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    save_profile(MEASURED, file)
    hardware = find_hardware(str(file))
    assert hardware.dense_flops("fp32") == 4e10
    assert hardware.attention_flops("fp32") == 1e10
    assert expert_flops(hardware.profile, replace(SHAPE, dtype="fp32"), 1) == 2e10
    assert hardware.bytes_per_s == 2e9
    assert hardware.peak_flops is None
    assert (hardware.memory_bytes, hardware.ranks_per_node) == (2**30, 1)
    assert find_hardware("h100").dense_flops("bf16") == DENSE_EFFICIENCY * 798e12


def test_a_profile_without_block_rates_has_those_of_the_experts(tmp_path: Path) -> None:
    file = tmp_path / "old.toml"
    save_profile(replace(MEASURED, dense_flops={}, attention_flops={}), file)
    hardware = find_hardware(str(file))
    assert hardware.dense_flops("fp32") == hardware.attention_flops("fp32") == 2e10


def test_what_is_missing_is_named_or_given(tmp_path: Path) -> None:
    file = tmp_path / "old.toml"
    save_profile(replace(MEASURED, memory_bytes=0, ranks_per_node=0), file)
    with pytest.raises(ConfigError, match="has no memory_bytes; add it, or give --memory-gib"):
        find_hardware(str(file))
    with pytest.raises(ConfigError, match="has no ranks_per_node; .* or give --ranks-per-node"):
        find_hardware(str(file), memory_gib=2)
    found = find_hardware(str(file), memory_gib=2.5, ranks_per_node=4)
    assert (found.memory_bytes, found.ranks_per_node) == (5 * 2**29, 4)
    assert find_hardware("h100", memory_gib=40).memory_bytes == 40 * 2**30
    with pytest.raises(ConfigError, match="--hardware is 'h300'; it must be one of h100, h200, b"):
        find_hardware("h300")
    file.write_text("links = 3")
    with pytest.raises(ConfigError, match="--hardware: links is 3"):
        find_hardware(str(file))


def test_auto_is_what_the_machine_has() -> None:
    known = find_hardware("h100")
    measured = replace(known, profile=MEASURED, peak_flops=None)
    for hardware, device, dtype in ((known, "cuda", "bf16"), (measured, "cpu", "fp32")):
        found = on_hardware(Config(), hardware)
        assert (found.run.device, found.train.dtype) == (device, dtype)
    asked = replace(Config(), run=RunConfig(device="cuda"))
    assert on_hardware(asked, measured).run.device == "cuda"


def test_dtype_is_one_that_has_a_rate() -> None:
    hardware = find_hardware("h100")
    assert dtype_on(Config(), hardware) == "bf16"
    with pytest.raises(ConfigError, match=r"train.dtype is fp32; NVIDIA H100 .* for bf16"):
        dtype_on(replace(Config(), train=TrainConfig(dtype="fp32")), hardware)
