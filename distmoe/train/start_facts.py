"""What a run says of itself when it starts: the header, after model and routing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distmoe.config import Config
from distmoe.data.run_data import RunData
from distmoe.engines import compute_dtype
from distmoe.kernels.moe_mlp import backend_for
from distmoe.kernels.moe_mlp.find_tiles import triton_version
from distmoe.mesh import Mesh
from distmoe.moe.layer import MoE
from distmoe.registry import MOE_MLP_TILES
from distmoe.runtime import Runtime
from distmoe.train.record_routing import RoutingRecorder
from distmoe.train.start import expert_shape, run_tiles

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class StartFacts:
    """Of a run with these MoE ``layers``. ``why_schedule``: of what is auto in moe.dispatch;
    ``done``: steps before this start; ``source``: the checkpoint that it begins with."""

    config: Config
    runtime: Runtime
    layers: list[MoE]
    mesh: Mesh | None
    data: RunData
    why_schedule: str
    done: int = 0
    source: Path | None = None

    def rows(self, recorder: RoutingRecorder) -> Rows:
        """Name and value of every line; ``recorder``: of the routing of this start."""
        config, ranks, device = self.config, self.runtime.ranks, self.runtime.device
        kernel = backend_for(config.moe.kernel, device)
        picked = f" (auto on {device.type})" if config.moe.kernel == "auto" else ""
        exchanges = {type(m.exchange).__name__ for m in self.layers}
        rows = [
            ("mesh", self.mesh.describe() if self.mesh else "1 rank"),
            ("ranks from", f"{ranks.source}, device {device.type}, {self._arithmetic()}"),
            ("engine", self._engine_name()),
            ("optimizer", config.optim.name),
            ("expert kernels", kernel + picked),
            ("exchange", ", ".join(sorted(exchanges)) or "none"),
            ("rows travel as", self._row_dtypes()),
            ("overlap", "on" if config.moe.dispatch.overlap else "off"),
            ("schedule", self._schedule()),
            ("data", self._data()),
            ("state", self._state()),
        ]
        if kernel in MOE_MLP_TILES:
            tiles = run_tiles(config.moe, device)
            rows.insert(5, ("tiles", tiles.describe(triton_version(), expert_shape(config))))
        if config.train.compile != "none":
            rows.append(("compiled", f"{config.train.compile} parts, when they first run"))
        if steps := recorder.steps_left:
            rows.append(("routing trace", f"{recorder.folder}, of the next {steps} steps"))
        return rows

    def _arithmetic(self) -> str:
        dtype = str(compute_dtype(self.config)).removeprefix("torch.")
        return f"{dtype}, deterministic" if self.config.run.deterministic else dtype

    def _data(self) -> str:
        tokens = self.config.train.global_batch_size * self.config.data.seq_len
        masked = ", attention inside of documents" if self.config.data.document_mask else ""
        return f"{self.data.describe()}, {tokens:,} tokens a step{masked}"

    def _state(self) -> str:
        if self.source is None:
            return "new run"
        if self.done:
            return f"resumed from {self.source}"
        return f"new run with the weights of {self.source}"

    def _engine_name(self) -> str:
        name = self.config.parallel.engine
        return f"{name}, ZeRO {self.config.deepspeed.zero_stage}" if name == "deepspeed" else name

    def _row_dtypes(self) -> str:
        """Also with one rank, where rows are rounded though nothing travels."""
        dispatch, computed = self.config.moe.dispatch, self.config.train.dtype
        row, sum_ = (
            computed if name == "computed" else name
            for name in (dispatch.row_dtype, dispatch.sum_dtype)
        )
        return f"{row}, partial sums {sum_}"

    def _schedule(self) -> str:
        schedules = {m.schedule for m in self.layers}
        if self.config.parallel.ep == 1 or not schedules:
            return "one rank: nothing travels"
        names = [f"level {s.level}, by {s.order}, {s.steps} steps" for s in schedules]
        return f"{', '.join(sorted(names))}; {self.why_schedule}"
