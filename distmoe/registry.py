"""Every choice a user makes by name, in one place: name -> "module:attribute".

A registration is one line in a table below. The module is imported when the name is picked, so
that configs are checked, and help is printed, without torch, and optional packages stay optional.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any


class Registry:
    """A constant table of implementations of one contract."""

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        self.kind = kind
        self._table = dict(table)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def load(self, name: str) -> Any:
        """The implementation called ``name``; ValueError lists the names if there is none."""
        if name not in self._table:
            raise ValueError(
                f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self._table))}"
            )
        module, attribute = self._table[name].split(":")
        return getattr(importlib.import_module(module), attribute)


ATTENTIONS = Registry(
    "attention",
    {
        "gqa": "distmoe.model.gqa:GroupedQueryAttention",
        "mla": "distmoe.model.mla:LatentAttention",
    },
)
ROUTERS = Registry(
    "router",
    {
        "softmax_topk": "distmoe.routing.routers.softmax_topk:SoftmaxTopK",
        "topk_softmax": "distmoe.routing.routers.topk_softmax:TopKSoftmax",
        "sigmoid_topk": "distmoe.routing.routers.sigmoid_topk:SigmoidTopK",
        "balanced": "distmoe.routing.routers.balanced:Balanced",
        "hash": "distmoe.routing.routers.hash:Hash",
    },
)
ROUNDING_RULES = Registry(
    "rounding rule",
    {
        "none": "distmoe.routing.rounding.none:RULE",
        "nearest": "distmoe.routing.rounding.nearest:RULE",
        "balance": "distmoe.routing.rounding.balance:RULE",
        "up": "distmoe.routing.rounding.up:RULE",
        "down": "distmoe.routing.rounding.down:RULE",
        "stochastic": "distmoe.routing.rounding.stochastic:RULE",
        "score": "distmoe.routing.rounding.score:RULE",
    },
)
SELECTIONS = Registry(
    "rounding selection",
    {
        "exact": "distmoe.routing.rounding.exact:SELECTION",
        "quota": "distmoe.routing.rounding.quota:SELECTION",
    },
)
ROUNDING_TRANSPORTS = Registry(
    "rounding transport",
    {
        "all_gather": "distmoe.routing.rounding.transports:by_all_gather",
        "owner": "distmoe.routing.rounding.transports:by_owner",
    },
)
EXCHANGES = Registry(
    "exchange",
    {
        "local": "distmoe.comm.local:LocalExchange",
        "p2p": "distmoe.comm.torch_p2p:PointToPointExchange",
        "all_to_all": "distmoe.comm.torch_all_to_all:AllToAllExchange",
        "threaded": "distmoe.comm.threaded:ThreadedExchange",
        "mpi": "distmoe.comm.mpi:MpiExchange",
    },
)
ROW_FORMATS = Registry(
    "format of travelling rows",
    {
        "computed": "distmoe.moe.row_formats.plain:ComputedRows",
        "bf16": "distmoe.moe.row_formats.plain:Bf16Rows",
        "fp8": "distmoe.moe.row_formats.fp8:Fp8Rows",
    },
)
MOE_MLP_BACKENDS = Registry(
    "moe_mlp backend",
    {
        "reference": "distmoe.kernels.moe_mlp.reference:ReferenceMoeMlp",
        "torch": "distmoe.kernels.moe_mlp.torch_backend:TorchMoeMlp",
        "triton": "distmoe.kernels.moe_mlp.triton_backend:TritonMoeMlp",
        "gluon": "distmoe.kernels.moe_mlp.gluon_backend:GluonMoeMlp",
        "sonicmoe": "distmoe.kernels.moe_mlp.sonicmoe_backend:SonicMoeMlp",
    },
)
MOE_MLP_TILES = Registry(
    "moe_mlp backend with tile configurations",
    {
        "triton": "distmoe.kernels.moe_mlp.tiles:SPACE",
        "gluon": "distmoe.kernels.moe_mlp.gluon_tiles:SPACE",
    },
)
# Activations of an expert: name -> whether it is gated, with 2I rows in the first matrix. What they
# compute is in kernels/moe_mlp/activations.py.
GATED_ACTIVATIONS = {
    "swiglu": True,
    "geglu": True,
    "reglu": True,
    "silu": False,
    "gelu": False,
    "relu2": False,
}
ROUTER_LOGITS_BACKENDS = Registry(
    "router_logits backend",
    {
        "torch": "distmoe.kernels.router_logits.reference:TorchRouterLogits",
        "triton": "distmoe.kernels.router_logits.triton_backend:TritonRouterLogits",
    },
)
ROUTER_TOPK_BACKENDS = Registry(
    "router_topk backend",
    {
        "torch": "distmoe.kernels.router_topk.torch_backend:TorchRouterTopK",
        "triton": "distmoe.kernels.router_topk.triton_backend:TritonRouterTopK",
    },
)
ROUND_SELECT_BACKENDS = Registry(
    "round_select backend",
    {
        "torch": "distmoe.kernels.round_select.torch_backend:TorchRoundSelect",
        "triton": "distmoe.kernels.round_select.triton_backend:TritonRoundSelect",
    },
)
ROUTING_INDEX_BACKENDS = Registry(
    "routing_index backend",
    {
        "torch": "distmoe.kernels.routing_index.torch_backend:build",
        "triton": "distmoe.kernels.routing_index.triton_backend:build",
    },
)
ARRANGE_PAIRS_BACKENDS = Registry(
    "arrange_pairs backend",
    {
        "torch": "distmoe.kernels.arrange_pairs.torch_backend:arrange",
        "triton": "distmoe.kernels.arrange_pairs.triton_backend:arrange",
    },
)
FP8_ROWS_BACKENDS = Registry(
    "fp8_rows backend",
    {
        "torch": "distmoe.kernels.fp8_rows.reference:TorchFp8Rows",
        "triton": "distmoe.kernels.fp8_rows.triton_backend:TritonFp8Rows",
    },
)
BALANCE_TARGETS_BACKENDS = Registry(
    "balance_targets backend",
    {
        "torch": "distmoe.kernels.balance_targets.reference:targets",
        "triton": "distmoe.kernels.balance_targets.triton_backend:targets",
    },
)
ENGINES = Registry(
    "engine",
    {
        "single": "distmoe.engines.single:SingleEngine",
        "fsdp2": "distmoe.engines.fsdp2:Fsdp2Engine",
        "deepspeed": "distmoe.engines.deepspeed_zero:DeepSpeedZeroEngine",
    },
)
ENGINE_COSTS = Registry(
    "engine that plans know",
    {
        "single": "distmoe.planner.engine_costs.single:SingleCosts",
        "fsdp2": "distmoe.planner.engine_costs.fsdp2:Fsdp2Costs",
        "deepspeed": "distmoe.planner.engine_costs.deepspeed:DeepSpeedCosts",
    },
)
OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": "distmoe.engines.adamw:build_adamw",
        "muon": "distmoe.engines.muon:build_muon",
    },
)
SCHEDULES = Registry(
    "learning-rate schedule",
    {
        "constant": "distmoe.train.schedule:constant",
        "cosine": "distmoe.train.schedule:cosine",
        "wsd": "distmoe.train.schedule:warmup_stable_decay",
    },
)
ARCHITECTURES = Registry(
    "architecture",
    {
        "qwen3_moe": "distmoe.convert.qwen3_moe:ARCHITECTURE",
        "olmoe": "distmoe.convert.olmoe:ARCHITECTURE",
        "mixtral": "distmoe.convert.mixtral:ARCHITECTURE",
        "deepseek_v2": "distmoe.convert.deepseek_v2:ARCHITECTURE",
        "deepseek_v3": "distmoe.convert.deepseek_v3:ARCHITECTURE",
        "kimi_k2": "distmoe.convert.kimi_k2:ARCHITECTURE",
        "glm4_moe": "distmoe.convert.glm4_moe:ARCHITECTURE",
    },
)
