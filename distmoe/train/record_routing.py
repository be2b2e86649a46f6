"""Keeps the router's decisions of some training steps and writes them as routing traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from distmoe.config import Config, RankInfo
from distmoe.kernels.router_topk.torch_backend import choose_top_k, integer_keys
from distmoe.metrics.routing_trace import (
    IntArray,
    RankTrace,
    TraceFacts,
    forget_traces,
    write_trace,
)
from distmoe.moe.layer import MoE
from distmoe.routing.routers import Scores

Recorded = list[tuple[IntArray, IntArray]]


class RoutingRecorder:
    """Writes the next ``config.train.record_routing`` steps of this rank; 0 does nothing.

    ValueError, in a step, for a router whose choice is not the top-k of its keys.
    """

    def __init__(self, config: Config, ranks: RankInfo, layers: list[MoE]) -> None:
        self.config, self.ranks, self.layers = config, ranks, layers
        self.folder = Path(config.run.dir) / "routing"
        self.steps_left = config.train.record_routing if layers else 0
        self._recorded: list[Recorded] = []

    @classmethod
    def open(
        cls, config: Config, ranks: RankInfo, layers: list[MoE], *, resumed_step: int
    ) -> RoutingRecorder:
        """With its folder, if there is something to record; OSError if that cannot be made. Files
        of steps after ``resumed_step`` are removed: this start makes those steps again."""
        recorder = cls(config, ranks, layers)
        if recorder.steps_left:
            recorder.folder.mkdir(parents=True, exist_ok=True)
            if ranks.rank == 0:
                forget_traces(recorder.folder, after_step=resumed_step)
        return recorder

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep every decision of the forwards inside, if there are steps left."""
        if not self.steps_left:
            yield
            return
        self._recorded = [[] for _ in self.layers]
        for layer, recorded in zip(self.layers, self._recorded, strict=True):
            layer.on_scores = _keeper(recorded)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.on_scores = None

    def write(self, step: int) -> None:
        """The file of what was kept last."""
        config = self.config
        facts = TraceFacts(
            step=step,
            rank=self.ranks.rank,
            world=self.ranks.world,
            ep=config.parallel.ep,
            top_k=config.moe.top_k,
            tile=config.moe.rounding.tile,
            layers=tuple(range(config.model.n_dense_layers, config.model.n_layers)),
        )
        key_LMTE, mass_LMTE = (
            np.stack([np.stack([pair[part] for pair in layer]) for layer in self._recorded])
            for part in (0, 1)
        )
        write_trace(self.folder, RankTrace(facts, key_LMTE, mass_LMTE))
        self._recorded = []
        self.steps_left -= 1


def _keeper(recorded: Recorded) -> Callable[[Scores], None]:
    def keep(scores: Scores) -> None:
        if not torch.equal(scores.chosen_TE, choose_top_k(scores.key_TE, scores.top_k)):
            raise ValueError(
                "train.record_routing: this router does not choose the top-k of its keys, and a "
                "trace holds keys only; it must be 0 with this moe.router"
            )
        # Copied at once: the keys of all layers together may not fit on the device.
        key_TE, mass_TE = scores.key_TE, integer_keys(scores.score_TE)
        recorded.append((key_TE.cpu().numpy(), mass_TE.cpu().numpy()))

    return keep
