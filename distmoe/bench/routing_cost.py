"""What rounding costs a layer: messages and bytes before the rows travel, and CPU time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from distmoe.comm import Traffic
from distmoe.config import MoEConfig, RoundingConfig
from distmoe.kernels.router_logits import router_logits
from distmoe.moe.dispatch import plan_dispatch
from distmoe.moe.layer import MoE
from distmoe.routing.round_tokens import round_scores
from distmoe.routing.routers import Scores
from distmoe.routing.routing import Routing

WAYS = {
    "top-k": RoundingConfig("none"),
    "balance, quota": RoundingConfig("balance", selection="quota"),
    "balance, exact by all-gather": RoundingConfig("balance", transport="all_gather"),
    "balance, exact by owner": RoundingConfig("balance", transport="owner"),
    "nearest, exact by all-gather": RoundingConfig("nearest", transport="all_gather"),
    "score, exact by all-gather": RoundingConfig("score", transport="all_gather"),
    "capacity, quota": RoundingConfig("none", selection="quota", capacity_factor=1.25),
    "capacity, exact": RoundingConfig("none", capacity_factor=1.25),
}


@dataclass(frozen=True)
class Cost:
    """Of one way to round, on one rank. ``rounds``, ``bytes_sent``: by kind of message, of one
    forward up to the rows; ``row_bytes``: of the rows then, in one direction. ``rounding_s``,
    ``layer_s``: CPU seconds of rounding and of a forward that rounds with `balance`, of all threads
    of this rank, medians."""

    name: str
    rounds: dict[str, int]
    bytes_sent: dict[str, int]
    row_bytes: int
    rounding_s: float
    layer_s: float

    @property
    def share(self) -> float:
        """Of the layer's forward; the gather of the counts, which top-k needs too, included."""
        return self.rounding_s / self.layer_s


def measure_costs(
    config: MoEConfig,
    *,
    num_tokens: int,
    repeats: int,
    group: dist.ProcessGroup | None,
) -> list[Cost]:
    """Every way on this rank, in turns with the layer; collective over ``group``."""
    rank = dist.get_rank(group) if group is not None else 0
    layer = MoE(config, group)
    # All ranks have the same router and other tokens.
    layer.router_EH.data.normal_(generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + rank)
    x_TH = torch.randn(num_tokens, config.hidden_size, generator=generator)
    x_TH *= config.hidden_size**-0.5
    with torch.no_grad():
        scores = layer.router(router_logits(x_TH, layer.router_EH))
        ways = {name: replace(way, tile=config.rounding.tile) for name, way in WAYS.items()}
        sent = {name: _sent(scores, layer, way) for name, way in ways.items()}
        row_bytes = x_TH[0].numel() * x_TH.element_size()
        layer_s: list[float] = []
        rounding_s: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            layer_s.append(_cpu_seconds(layer, x_TH))
            for name, way in ways.items():
                rounding_s[name].append(_cpu_seconds(round_scores, scores, layer.exchange, way))
    return [
        Cost(
            name=name,
            rounds=sent[name][0].rounds,
            bytes_sent=sent[name][0].bytes_sent,
            row_bytes=sent[name][1] * row_bytes,
            rounding_s=statistics.median(rounding_s[name]),
            layer_s=statistics.median(layer_s),
        )
        for name in ways
    ]


def _sent(scores: Scores, layer: MoE, rounding: RoundingConfig) -> tuple[Traffic, int]:
    """Traffic of all that happens before the first row travels, and the rows that travel then."""
    exchange = layer.exchange
    traffic = exchange.traffic = Traffic()
    rounded = round_scores(scores, exchange, rounding)
    routing = Routing.from_mask(rounded.selected_TE, scores.weight(rounded.selected_TE))
    plan = plan_dispatch(routing, exchange, tile=rounding.tile, from_ranks_Pe=rounded.from_ranks_Pe)
    exchange.traffic = Traffic()
    return traffic, plan.rows_sent()


def _cpu_seconds(function: Callable[..., object], *arguments: object) -> float:
    begun = time.process_time()
    function(*arguments)
    return time.process_time() - begun
