"""The names of DeepSpeed that the adapter uses and DeepSpeed does not promise to keep. When one is
gone, look here first; what they do is the matter of test_deepspeed.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import cpu_accelerator, real_accelerator
from deepspeed.comm.torch import build_shm_op
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.runtime import bf16_optimizer, engine
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.utils import groups, mixed_precision_linkage
from deepspeed.utils.tensor_fragment import get_full_hp_param, set_full_hp_param

from distmoe.engines.deepspeed_state import FLAT_MASTERS
from distmoe.engines.deepspeed_zero import ExpertsMark, _prepare, mark_experts

ZERO = {
    "single_partition_of_fp32_groups": stage_1_and_2.DeepSpeedZeroOptimizer,
    "fp32_groups_flat_partition": bf16_optimizer.BF16_Optimizer,
    "fp32_partitioned_groups_flat": stage3.DeepSpeedZeroOptimizer_Stage3,
}
METHODS = [
    (AutoEPMoELayer, "set_deepspeed_parallelism"),
    (cpu_accelerator, "CPU_Accelerator"),
    (real_accelerator, "set_accelerator"),
    (deepspeed.utils.logging, "set_log_level_from_string"),
    (engine.DeepSpeedEngine, "_backward_prologue"),
    (engine.DeepSpeedEngine, "set_gradient_accumulation_boundary"),
    (engine.DeepSpeedEngine, "get_global_grad_norm"),
    (engine.DeepSpeedEngine, "destroy"),
    (groups, "_create_expert_and_data_parallel"),
    (groups, "_get_data_parallel_group"),
    (groups, "_get_expert_data_parallel_group_dict"),
    (groups, "_get_expert_parallel_group_dict"),
    (groups, "_release_process_group_references"),
    *((optimizer, "clear_backward_seen_flag") for optimizer in ZERO.values()),
    (stage_1_and_2.DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state"),
    (stage_1_and_2.DeepSpeedZeroOptimizer, "update_lp_params"),
    (bf16_optimizer.BF16_Optimizer, "_lazy_init_hp_params_optimizer_state"),
    (bf16_optimizer.BF16_Optimizer, "update_lp_params"),
    (stage3.DeepSpeedZeroOptimizer_Stage3, "get_full_hp_param"),
    (stage3.DeepSpeedZeroOptimizer_Stage3, "set_local_hp_param"),
    (stage3.DeepSpeedZeroOptimizer_Stage3, "checkpoint_event_prologue"),
    (stage3.DeepSpeedZeroOptimizer_Stage3, "checkpoint_event_epilogue"),
    (stage3.DeepSpeedZeroOptimizer_Stage3, "_reassign_or_swap_out_partitioned_parameters"),
]
# What the experts' parameters and the mark carry, and who reads it.
ATTRIBUTES = [
    ("allreduce", deepspeed.moe.utils),
    ("group_name", stage_1_and_2),
    ("ds_zero_placement_family", engine),
    ("ds_zero_partition_group_name", engine),
    ("num_experts", engine),
]


def test_the_version_is_the_one_that_the_extra_pins() -> None:
    assert deepspeed.__version__ == "0.19.8"


@pytest.mark.parametrize(("owner", "name"), METHODS)
def test_the_adapter_calls_what_is_there(owner: object, name: str) -> None:
    assert callable(getattr(owner, name, None)), name


@pytest.mark.parametrize(("attribute", "reader"), ATTRIBUTES)
def test_attributes_of_experts_are_read(attribute: str, reader: object) -> None:
    assert attribute in inspect.getsource(reader)  # type: ignore[arg-type]
    assert attribute in inspect.getsource(mark_experts) + inspect.getsource(ExpertsMark)


@pytest.mark.parametrize("function", [get_full_hp_param, set_full_hp_param])
def test_parameters_get_their_flat_runs_by_the_key_of_a_moment(
    function: Callable[..., Any],
) -> None:
    assert list(inspect.signature(function).parameters)[-1] == "optim_state_key"
    assert f"lp_param.{function.__name__} =" in inspect.getsource(mixed_precision_linkage)


def test_every_optimizer_has_its_flat_masters_and_says_what_it_skipped() -> None:
    assert tuple(ZERO) == FLAT_MASTERS
    for name, optimizer in ZERO.items():
        source = inspect.getsource(optimizer)
        assert f"self.{name} = []" in source
        assert "self.overflow = True" in source


def test_experts_are_found_by_the_class_of_the_mark() -> None:
    assert isinstance(ExpertsMark(8, 2), AutoEPMoELayer)
    assert "isinstance(module, _AutoEPMoELayer)" in inspect.getsource(engine)


def test_the_group_of_a_size_gives_the_size() -> None:
    source = inspect.getsource(groups._create_expert_and_data_parallel)
    assert 'group_name = f"ep_size_{expert_parallel_size_}"' in source


def test_no_collective_is_compiled() -> None:
    _prepare(torch.device("cpu"))
    assert "deepspeed.ops.__compatible_ops__.get(" in inspect.getsource(build_shm_op)
    assert build_shm_op() is None
