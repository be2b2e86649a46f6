"""Jobs whose throughput others have published: what is known of each, as settings of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distmoe.config import Config, resolve
from distmoe.config.keys import with_values
from distmoe.metrics.flops import flops_per_token

DENSE_ONLY = {"moe.num_experts": 1, "moe.top_k": 1, "moe.rounding.rule": "none"}
SONICMOE_7B = {
    "model.vocab_size": 50304,
    "model.hidden_size": 1536,
    "model.n_layers": 44,
    "model.n_dense_layers": 0,
    "model.n_heads": 12,
    "model.n_kv_heads": 4,
    "moe.num_experts": 128,
    "moe.top_k": 8,
    "moe.intermediate_size": 256,
    "moe.rounding.rule": "none",
    "data.seq_len": 4096,
    "parallel.engine": "fsdp2",
    "parallel.dp_shard": 8,
    "parallel.ep": 1,
}
LLAMA3_8B = DENSE_ONLY | {
    "model.vocab_size": 128256,
    "model.hidden_size": 4096,
    "model.n_layers": 32,
    "model.n_dense_layers": 32,
    "model.n_heads": 32,
    "model.n_kv_heads": 8,
    "model.intermediate_size": 14336,
    "model.qk_norm": False,
    "data.seq_len": 8192,
    "parallel.engine": "fsdp2",
    "train.micro_batch_size": 1,
    "train.activation_checkpoint": "selective",
}
QWEN3_30B = {
    "model.vocab_size": 151936,
    "model.hidden_size": 2048,
    "model.n_layers": 48,
    "model.n_dense_layers": 0,
    "model.n_heads": 32,
    "model.n_kv_heads": 4,
    "model.head_dim": 128,
    "moe.num_experts": 128,
    "moe.top_k": 8,
    "moe.intermediate_size": 768,
    "moe.rounding.rule": "none",
    "moe.router": "balanced",
    "data.seq_len": 4096,
}
MIXTRAL_8X22B = {
    "model.vocab_size": 32768,
    "model.hidden_size": 6144,
    "model.n_layers": 56,
    "model.n_dense_layers": 0,
    "model.n_heads": 48,
    "model.n_kv_heads": 8,
    "model.qk_norm": False,
    "moe.num_experts": 8,
    "moe.top_k": 2,
    "moe.intermediate_size": 16384,
    "moe.rounding.rule": "none",
    "data.seq_len": 4096,
    "moe.router": "balanced",
}
QWEN2_57B = {
    "model.vocab_size": 151936,
    "model.hidden_size": 3584,
    "model.n_layers": 28,
    "model.n_dense_layers": 0,
    "model.n_heads": 28,
    "model.n_kv_heads": 4,
    "model.qk_norm": False,
    "moe.num_experts": 64,
    "moe.top_k": 8,
    "moe.intermediate_size": 2560,
    "moe.shared_intermediate_size": 20480,
    "moe.rounding.rule": "none",
    "data.seq_len": 4096,
    "moe.router": "balanced",
}
DEEPSEEK_16B = {
    "model.vocab_size": 102400,
    "model.hidden_size": 2048,
    "model.n_layers": 27,
    "model.n_dense_layers": 1,
    "model.intermediate_size": 10944,
    "model.n_heads": 16,
    "model.n_kv_heads": 16,
    "model.head_dim": 160,
    "model.qk_norm": False,
    "moe.num_experts": 64,
    "moe.top_k": 6,
    "moe.intermediate_size": 1408,
    "moe.shared_intermediate_size": 2816,
    "moe.rounding.rule": "none",
    "moe.router": "balanced",
    "data.seq_len": 4096,
    "parallel.engine": "fsdp2",
    "parallel.ep": 32,
}


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
        "dense, 1 x 8192 tokens; they compute every second product again, we all of a block",
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
        QWEN3_30B | MEGATRON_EP16,
        "1 x 4096 tokens, EP 16 with overlap, forced balance",
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
        "Mixtral 8x22B",
        "arXiv 2504.14960",
        128,
        _tokens_at(0.493, MIXTRAL_8X22B, 128),
        MIXTRAL_8X22B,
        "49.3 % MFU with tensor and pipeline parallelism",
    ),
    Row(
        "Qwen2-57B-A14B",
        "arXiv 2504.14960",
        64,
        _tokens_at(0.390, QWEN2_57B, 64),
        QWEN2_57B,
        "39.0 % MFU with tensor and pipeline parallelism",
    ),
    Row(
        "DeepSeek 16B",
        "torchtitan #3434",
        32,
        9775,
        DEEPSEEK_16B | COPIES | {"moe.dispatch.steps": 2, "moe.dispatch.overlap": True},
        "EP 32, a copy for every expert, two chunks; latent attention as 16 heads of 160",
        "their step waits on the host for the sizes of every exchange, and moves rows into place",
    ),
    Row(
        "Qwen3-30B-A3B",
        "mlc-ai/pith-train #79",
        8,
        19450,
        QWEN3_30B | {"parallel.engine": "fsdp2", "parallel.ep": 1},
        "torchtitan without EP",
        "a B200 is assumed to reach what an H100 does, with kernels that they have not",
        machine="b200",
    ),
    Row(
        "Qwen3-30B-A3B",
        "mlc-ai/pith-train #79",
        8,
        20000,
        QWEN3_30B | {"parallel.ep": 4},
        "PithTrain, EP 4, forced balance",
        "the same",
        machine="b200",
    ),
)
