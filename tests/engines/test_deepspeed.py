"""DeepSpeed under the laws of the other engines, in real processes: it has a state of its own for a
whole process, which ranks as threads would share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed_ranks import config_of, read, write
from deepspeed_start import Results, run_all
from parity_runs import FEW_STEPS, LAW, assert_equal_runs
from parity_runs import run as run_threads
from test_training_by_hand import assert_bf16_as_good_as_by_hand, by_hand
from training_by_hand import BF16 as BY_HAND_BF16
from training_by_hand import OPTIM

pytestmark = pytest.mark.processes


def case(job: str, world: int, ep: int, stage: int = 0, **others: Any) -> dict[str, Any]:
    """``stage`` 0: fsdp2."""
    settings = {"zero_stage": stage} | others.pop("deepspeed", {}) if stage else {}
    found = {
        "job": job,
        "engine": "deepspeed" if stage else "fsdp2",
        "world": world,
        "ep": ep,
        "deepspeed": settings,
        **others,
    }
    details = [*(str(value) for key, value in settings.items() if key != "pin_memory")]
    details += [str(value) for value in others.values()]
    return found | {"name": "-".join([job, f"world{world}", f"ep{ep}", *details])}


OFFLOAD = {"deepspeed": {"offload_optimizer": "cpu", "pin_memory": False}}

# Every stage, and every line of the law. tools/check_deepspeed_parity.py has the whole matrix.
PARITY = [
    case("parity", 4, 2, 3, steps=FEW_STEPS),
    case("parity", 4, 4, 2, steps=FEW_STEPS),
    case("parity", 2, 1, 2, steps=FEW_STEPS),
    case("parity", 2, 2, 1, steps=FEW_STEPS, **OFFLOAD),
    case("parity", 2, 2, 2, steps=FEW_STEPS, cp=2),
    case("parity", 1, 1, 1, steps=FEW_STEPS, compile="dense"),
    case("parity", 1, 1, 3, steps=FEW_STEPS),
]
BY_HAND = case("by_hand", 2, 2, 2)
# In bf16 stage 1 is another optimizer of DeepSpeed.
SKIP = [case("skip", 2, 2, 2), case("skip", 2, 2, 3), case("skip", 2, 2, 1, dtype="bf16")]
BF16 = [case("bf16", 2, 2, stage) for stage in (1, 3)]
ONE = {"job": "write", "engine": "single", "world": 1, "ep": 1, "checkpoint": "one"}
# A checkpoint is written before it is read.
CHECKPOINTS = [
    case("write", 4, 2, 3, checkpoint="zero3"),
    case("read", 2, 2, checkpoint="zero3"),
    case("read", 2, 1, 1, checkpoint="zero3"),
    case("read", 2, 2, 3, checkpoint="one"),
    case("write", 2, 2, checkpoint="fsdp2"),
    case("read", 2, 1, 2, checkpoint="fsdp2"),
    case("write", 2, 2, 1, checkpoint="zero1"),
]
READ = [c for c in CHECKPOINTS if c["job"] == "read"]
name_of = {"ids": lambda c: c["name"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return write(ONE, 0, folder)


@pytest.fixture(scope="module")
def results(folder: Path, one: dict[str, Any]) -> Results:
    return run_all([*PARITY, BY_HAND, *CHECKPOINTS, *SKIP, *BF16], folder, timeout_s=300)


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    return run_threads(1, 1, LAW[1, 1], engine="single", steps=FEW_STEPS)[0]


@pytest.mark.parametrize("case", PARITY, **name_of)
def test_parity_law(case: dict[str, Any], results: Results, oracle: dict[str, Any]) -> None:
    found = results.of(case["name"])
    for result in found:
        assert_equal_runs(result, oracle)
    groups = [found[rank]["decisions"] for rank in range(0, case["world"], case["ep"])]
    assert np.array_equal(np.sum(groups, axis=0), oracle["decisions"])


def test_three_steps_by_hand(results: Results) -> None:
    found = results.of(BY_HAND["name"])
    want = by_hand(found[0]["initial"], config_of(BY_HAND, settings=OPTIM))
    for result in found:
        assert_equal_runs(result, want)


def assert_same_state(found: dict[str, Any], want: dict[str, Any]) -> None:
    for part in ("model", "optimizer"):
        assert found[part].keys() == want[part].keys()
        for name, value in want[part].items():
            assert np.array_equal(found[part][name], value), name


@pytest.mark.parametrize("case", SKIP, **name_of)
def test_a_step_that_is_not_finite_changes_nothing(case: dict[str, Any], results: Results) -> None:
    for result in results.of(case["name"]):
        assert result["skipped"] == [True, True]
        assert_same_state(result["after"], result["before"])
        assert result["losses"] == result["want"]


@pytest.mark.parametrize("case", BF16, **name_of)
def test_bf16_is_as_good_as_by_hand(
    case: dict[str, Any], results: Results, oracle: dict[str, Any]
) -> None:
    for result in results.of(case["name"]):
        assert_bf16_as_good_as_by_hand(result, config_of(case, **BY_HAND_BF16))
        for name, want in oracle["initial"].items():
            assert np.array_equal(result["initial"][name], want), name


def written(checkpoint: str, results: Results, one: dict[str, Any]) -> dict[str, Any]:
    if checkpoint == "one":
        return one
    (case,) = (c for c in CHECKPOINTS if (c["job"], c["checkpoint"]) == ("write", checkpoint))
    return results.of(case["name"])[0]


def test_no_group_of_its_own_waits_longer_than_the_run_allows(results: Results) -> None:
    (case,) = (c for c in CHECKPOINTS if (c["job"], c["checkpoint"]) == ("write", "zero1"))
    for result in results.of(case["name"]):
        # launch.timeout_s; torch lets gloo wait for 30 minutes.
        assert result["waits"] == {600}


@pytest.mark.parametrize("case", READ, **name_of)
def test_a_checkpoint_loads_across_engines(
    case: dict[str, Any], results: Results, one: dict[str, Any]
) -> None:
    want = written(case["checkpoint"], results, one)
    assert any(value.any() for name, value in want["state"]["model"].items() if "bias_E" in name)
    for found in results.of(case["name"]):
        assert_same_state(found["state"], want["state"])
        assert found["losses"] == pytest.approx(want["losses"], rel=1e-5)


@pytest.mark.parametrize("checkpoint", ["zero3", "zero1"])
def test_a_single_rank_loads_what_deepspeed_wrote(
    checkpoint: str, results: Results, one: dict[str, Any], folder: Path
) -> None:
    want = written(checkpoint, results, one)
    found = read(ONE | {"checkpoint": checkpoint}, 0, folder)
    assert_same_state(found["state"], want["state"])
    assert found["losses"] == pytest.approx(want["losses"], rel=1e-5)
