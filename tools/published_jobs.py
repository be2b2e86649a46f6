"""Jobs whose throughput others have published: what is known of each, as settings of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from published_models import (
    DEEPSEEK_16B,
    LLAMA3_8B,
    MIXTRAL_8X22B,
    QWEN2_57B,
    QWEN3_30B,
    SONICMOE_7B,
)

from distmoe.config import Config, resolve
from distmoe.config.keys import with_values
from distmoe.metrics.flops import flops_per_token

H100_PEAK = 989e12
DAY_S = 86400


@dataclass(frozen=True)
class Row:
    """``published``: tokens/s of a GPU. ``settings``: what is known. ``batch``: sequences of a step
    on a GPU, assumed where the settings do not say. ``machine`` as --hardware. ``expert_flops``: of
    kernels that are not ours. ``known``, in words, with what is assumed; ``why``: what explains a
    large error."""

    name: str
    source: str
    gpus: int
    published: float
    settings: dict[str, Any]
    known: str
    why: str = ""
    machine: str = "h100"
    expert_flops: float = 0.0
    batch: int = 8


def _tokens_at(mfu: float, settings: dict[str, Any], gpus: int) -> float:
    """Tokens/s of a GPU at a published share of its peak, by our count of the model's FLOPs."""
    return mfu * H100_PEAK / flops_per_token(resolve(config_of(settings), gpus)).model


def config_of(settings: dict[str, Any]) -> Config:
    return with_values(Config(), {"train.dtype": "bf16", "run.device": "cuda"} | settings)


MEGATRON_EP16 = {"parallel.ep": 16, "train.micro_batch_size": 1}
COPIES = {
    "moe.dispatch.level": "copies",
    "moe.dispatch.order": "tokens",
    "moe.dispatch.steps": 1,
    "moe.dispatch.overlap": False,
}
GROUPED_MM = (
    "their experts are torch._grouped_mm, for which 242 TFLOP/s are reported (forward, a layer of "
    "Qwen3-30B-A3B: ByteDance-Seed/VeOmni #460) where 510 are assumed"
)
B200_EXPERTS = "their experts are torch._grouped_mm, on a B200 where 1,100 TFLOP/s are assumed"
ROW_FOR_EVERY_RANK = COPIES | {"moe.dispatch.level": "rank"}
TITAN_EP32 = {"parallel.ep": 32, "moe.router": "balanced"}
NOUS_EP8 = {
    "parallel.engine": "fsdp2",
    "parallel.ep": 8,
    "train.micro_batch_size": 8,
    "train.activation_checkpoint": "full",
}
ROWS = (
    Row(
        "SonicMoE 7B",
        "arXiv 2512.14080",
        64,
        213e9 / DAY_S / 64,
        SONICMOE_7B,
        "ZeRO-3 in the node, replicas; 44 layers and 4096 tokens a sequence assumed",
    ),
    Row(
        "ScatterMoE 7B",
        "arXiv 2512.14080",
        96,
        225e9 / DAY_S / 96,
        SONICMOE_7B,
        "the same; experts at the 209 TFLOP/s of the paper's figure 14",
        expert_flops=209e12,
    ),
    Row(
        "Llama 3 8B, eager",
        "torchtitan, 2024-12",
        8,
        5762,
        LLAMA3_8B,
        "H100 of 96 GB and 500 W; dense, 1 x 8192 tokens; they compute every second product "
        "again, we all of a block",
        batch=1,
    ),
    Row(
        "Llama 3 8B, eager",
        "torchtitan, 2024-12",
        128,
        5605,
        LLAMA3_8B,
        "the same",
        batch=1,
    ),
    Row(
        "Qwen3-30B-A3B",
        "Megatron-Bridge, 2026-08",
        16,
        1024 * 4096 / 16 / 20.15,
        QWEN3_30B | MEGATRON_EP16 | {"moe.dispatch.level": "node"},
        "1 x 4096 tokens, EP 16 with overlap, forced balance; HybridEP, taken as a row for a node",
        batch=64,
    ),
    Row(
        "Qwen3-30B-A3B, all-to-all",
        "Megatron-Bridge, 2026-05",
        16,
        1024 * 4096 / 16 / 41.25,
        QWEN3_30B | MEGATRON_EP16 | COPIES,
        "the same with a copy of a row for every expert, without overlap",
        batch=64,
    ),
    Row(
        "Qwen3-30B-A3B, all-to-all",
        "Megatron-Bridge, 2026-05",
        16,
        1024 * 4096 / 16 / 31.31,
        QWEN3_30B | MEGATRON_EP16 | {"moe.dispatch.level": "copies"},
        "the same with overlap",
        batch=64,
    ),
    Row(
        "Mixtral 8x22B",
        "arXiv 2504.14960",
        128,
        _tokens_at(0.493, MIXTRAL_8X22B, 128),
        MIXTRAL_8X22B,
        "49.3 % MFU with tensor and pipeline parallelism; tokens/s computed from it by our FLOPs",
    ),
    Row(
        "Qwen2-57B-A14B",
        "arXiv 2504.14960",
        64,
        _tokens_at(0.390, QWEN2_57B, 64),
        QWEN2_57B,
        "39.0 % MFU with tensor and pipeline parallelism; tokens/s computed from it by our FLOPs",
    ),
    Row(
        "DeepSeek 16B",
        "torchtitan #3434",
        32,
        9775,
        DEEPSEEK_16B
        | TITAN_EP32
        | COPIES
        | {"moe.dispatch.steps": 2, "moe.dispatch.overlap": True},
        "4 x 4096 tokens, EP 32, a copy for every expert, two chunks, forced balance",
        GROUPED_MM,
        batch=4,
    ),
    Row(
        "DeepSeek 16B, no overlap",
        "torchtitan #3434",
        32,
        7670,
        DEEPSEEK_16B | TITAN_EP32 | COPIES,
        "the same without chunks",
        GROUPED_MM,
        batch=4,
    ),
    Row(
        "DeepSeek 16B",
        "torchtitan #1789",
        8,
        11500,
        DEEPSEEK_16B | COPIES | {"parallel.ep": 8, "train.activation_checkpoint": "selective"},
        "4 x 4096 tokens, EP 8, a copy for every expert, without overlap; steps 10 to 40 of one "
        "rank, 11,250 to 11,760",
        GROUPED_MM,
        batch=4,
    ),
    Row(
        "Qwen3-30B-A3B",
        "NousResearch/torchtitan #19",
        8,
        9930,
        QWEN3_30B | NOUS_EP8 | COPIES,
        "compiled, EP 8, a copy for every expert, without overlap; taken from the next row: "
        "8 x 4096 tokens, everything computed again, forced balance",
        f"{B200_EXPERTS}; rows are moved into place by operators that the next row has fused",
        machine="b200",
    ),
    Row(
        "Qwen3-30B-A3B, DeepEP",
        "NousResearch/torchtitan #19",
        8,
        14796,
        QWEN3_30B | NOUS_EP8 | ROW_FOR_EVERY_RANK,
        "the same, a row for every rank",
        B200_EXPERTS,
        machine="b200",
    ),
    Row(
        "Qwen3-30B-A3B",
        "mlc-ai/pith-train #79",
        8,
        19450,
        QWEN3_30B
        | {
            "moe.router": "softmax_topk",
            "data.seq_len": 8192,
            "parallel.engine": "fsdp2",
            "parallel.ep": 1,
            "train.micro_batch_size": 8,
        },
        "torchtitan without EP, compiled, 8 x 8192 tokens; what they recompute is none of our ways",
        machine="b200",
    ),
    Row(
        "Qwen3-30B-A3B",
        "mlc-ai/pith-train #79",
        8,
        20000,
        QWEN3_30B | {"data.seq_len": 8192, "parallel.ep": 4},
        "PithTrain, EP 4 and two pipeline stages, 8192 tokens a sequence, forced balance",
        "stages of a pipeline wait for one another, which a plan does not know",
        machine="b200",
    ),
)
