"""DeepSpeed's own configuration, made from ours; nobody writes it by hand."""

from __future__ import annotations

from typing import Any

import torch

from distmoe.config import Config, DeepSpeedConfig
from distmoe.config.batch import micro_batches


def deepspeed_json(config: Config, *, world: int, dtype: torch.dtype) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``. ``config`` is resolved for ``world`` ranks,
    ``dtype`` is that of forward and backward.

    The optimizer and its schedule are ours and not in it. Gradients are added up, reduced and kept
    in fp32 whatever ``dtype`` is.
    """
    train = config.train
    return {
        # It counts sequences that several ranks share once for each of them.
        "train_batch_size": train.global_batch_size * config.parallel.cp,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches(config, world),
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": _zero(config.deepspeed),
        # Without it AdamW on host memory is refused; torch's is fused, and needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
    }


def _zero(options: DeepSpeedConfig) -> dict[str, Any]:
    buckets = options.bucket_elements
    zero: dict[str, Any] = {
        "stage": options.zero_stage,
        "overlap_comm": options.overlap_comm,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": buckets,
        # DeepSpeed wants it even.
        "allgather_bucket_size": buckets + buckets % 2,
    }
    if options.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = buckets
        zero["stage3_param_persistence_threshold"] = options.persistence_elements
    for key, device in (
        ("offload_optimizer", options.offload_optimizer),
        ("offload_param", options.offload_parameters),
    ):
        if device != "none":
            zero[key] = {"device": device, "pin_memory": options.pin_memory}
    return zero
