from pathlib import Path

import pytest

from distmoe.planner.machine_profile import (
    PRESETS,
    Link,
    Origin,
    Profile,
    ProfileError,
    find_profile,
    load_profile,
    save_profile,
)

PROFILE = Profile(
    links={"own": Link(1e-6, 1e10), "remote": Link(2.5e-4, 1.25e8, shared=True)},
    gemm_flops={"fp32": 2e10},
    host_latency_s=3e-5,
    origin=Origin("a device", "2026-01-31", "2 ranks", {"torch": "2.13.0"}),
    dense_flops={"fp32": 4e10},
    attention_flops={"fp32": 1e10},
    collective_share={"gather": 0.5},
    memory_bytes=2**33,
    ranks_per_node=2,
)


def test_file_round_trip(tmp_path: Path) -> None:
    save_profile(PROFILE, tmp_path / "machine.toml")
    assert load_profile(tmp_path / "machine.toml") == PROFILE
    assert find_profile(str(tmp_path / "machine.toml"), "NVIDIA H200") == PROFILE


def test_short_file_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    file.write_text("host_latency_s = 0\n[links.own]\nlatency_s = 0\nbytes_per_s = 1\n[gemm_flops]")
    assert load_profile(file) == Profile({"own": Link(0.0, 1.0)}, {}, 0.0)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("latency_s = 1e-06", "latency_s = -1", "links.own.latency_s is -1 in profile"),
        ("latency_s = 1e-06", "latency_s = nan", "links.own.latency_s is nan"),
        ("latency_s = 1e-06", "latency_s = true", "it must be a number, at least 0"),
        ("latency_s = 1e-06\n", "", "links.own.latency_s is 'missing'"),
        (
            "bytes_per_s = 125000000.0",
            "bytes_per_s = 0",
            "remote.bytes_per_s is 0 in profile",
        ),
        ("bytes_per_s = 125000000.0", "bytes_per_s = inf", "it must be a number, greater than 0"),
        ("shared = true", 'shared = "yes"', "shared is 'yes' in profile"),
        ("links.remote", "links.rail", "unknown key 'links.rail'"),
        ("links.own", "links.node", "links.own is 'missing'"),
        ("fp32 = ", "fp64 = ", "known: bf16, fp32"),
        ("gather = 0.5", "gather = 0", "collective_share.gather is 0"),
        ("gather = ", "scatter = ", "unknown key 'collective_share.scatter'"),
        ("ranks_per_node = 2", "ranks_per_node = -2", "ranks_per_node is -2"),
        ("host_latency_s", "host_latency", "unknown key 'host_latency' (3e-05)"),
        ('device = "a device"', "device = 7", "origin.device is 7"),
        ('torch = "2.13.0"', "torch = 2.13", "origin.versions.torch is 2.13"),
        ("[links.own]", "[links.own", "cannot be read"),
    ],
)
def test_wrong_file_names_key_value_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    file = tmp_path / "machine.toml"
    save_profile(PROFILE, file)
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ProfileError) as caught:
        load_profile(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_missing_file_and_missing_link() -> None:
    with pytest.raises(ProfileError, match="profile 'no/file' cannot be read"):
        load_profile("no/file")
    with pytest.raises(ValueError, match="no link 'node'; it has own, remote"):
        PROFILE.link("node")


def test_presets_are_found_by_device() -> None:
    assert find_profile("", "NVIDIA H200") is PRESETS["NVIDIA H200"]
    assert find_profile("", "a slide rule") is None
    for name, preset in PRESETS.items():
        assert preset.origin.device == name
        assert preset.link("own").bytes_per_s > preset.link("node").bytes_per_s
        assert preset.link("node").bytes_per_s > preset.link("remote").bytes_per_s


def test_link_through_two_messages() -> None:
    link = Link.through((1000, 3.0), (5000, 5.0))
    assert link == Link(2.5, 2000.0)
    assert Link.through((1000, 3.0), (5000, 2.0)) == Link(3.0, 2500.0)
