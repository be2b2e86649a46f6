"""The mixture-of-experts layer: route, round, dispatch, experts, combine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmoe.comm import make_exchange
from distmoe.config import MoEConfig, RoundingConfig
from distmoe.kernels.moe_mlp import MoeMlp, backend_for, load_backend
from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.kernels.router_logits import router_logits
from distmoe.moe.dispatch import plan_dispatch
from distmoe.moe.ep_function import ExpertParallel
from distmoe.moe.experts import Experts
from distmoe.moe.mlp import SwiGluMlp
from distmoe.moe.plan import DispatchPlan
from distmoe.moe.routing_tape import decided, is_replay
from distmoe.moe.stats import MoEStats
from distmoe.moe.timed_mlp import TimedMlp
from distmoe.routing.losses import load_balance_loss, z_loss
from distmoe.routing.round_tokens import Rounded, round_scores
from distmoe.routing.routers import Scores, make_router
from distmoe.routing.routing import Routing


@dataclass(frozen=True)
class MoELosses:
    """Router losses of one forward, unweighted, fp32 scalars with gradients.

    Each is this rank's share: the sum over the ranks of the loss group is the loss of its tokens.
    """

    load_balance: Tensor
    z: Tensor


@dataclass(frozen=True)
class _BalanceCounts:
    """Top-k pairs per expert for the load-balance loss, their tokens, and all ranks' tokens."""

    freq_E: Tensor
    freq_tokens: int | Tensor
    all_tokens: int | Tensor


@dataclass(frozen=True)
class _Decision:
    """Everything of a forward that carries no gradient, and that a replay must not make again."""

    routing: Routing
    selected_TE: Tensor
    plan: DispatchPlan
    stats: MoEStats
    balance: _BalanceCounts


class MoE(nn.Module):
    """x [..., H] -> (out [..., H], losses): a drop-in MLP whose experts live on many ranks.

    ``ep_group``: ranks that share the experts; each holds num_experts / P of them, in rank order,
    and calls the layer with its own tokens. None: this rank alone. ``loss_group``: ranks over
    whose tokens the router losses are taken; by default all ranks, if a process group exists.
    Training rounds, evaluation is plain top-k. ``stats`` tells what the last forward did.
    """

    stats: MoEStats

    def __init__(
        self,
        config: MoEConfig,
        ep_group: dist.ProcessGroup | None = None,
        *,
        loss_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        num_ranks = dist.get_world_size(ep_group) if ep_group is not None else 1
        _check(config, num_ranks)
        self.config = config
        self.loss_group = loss_group
        self.exchange = make_exchange(ep_group, config.dispatch.exchange)
        self._mlp: MoeMlp | None = None
        self.router = make_router(config.router, top_k=config.top_k, renormalize=config.renormalize)
        self.router_EH = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.experts = Experts(
            num_local=config.num_experts // num_ranks,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            activation=config.activation,
        )
        self.shared: SwiGluMlp | None = None
        if config.shared_intermediate_size:
            self.shared = SwiGluMlp(config.hidden_size, config.shared_intermediate_size)
        if self.router_EH.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """N(0, std^2) from torch's default generator; seed ranks apart, or experts start equal."""
        for parameter in self.parameters():
            parameter.normal_(0.0, std)

    @property
    def mlp(self) -> MoeMlp:
        """The backend, picked in the first forward: where the weights will live is known then."""
        if self._mlp is None:
            name = backend_for(self.config.kernel, self.router_EH.device)
            self._mlp = load_backend(name, self.config.activation)
        return self._mlp

    def _observed_mlp(self) -> MoeMlp:
        observer = self.exchange.observer
        return TimedMlp(self.mlp, observer) if observer.is_tracing else self.mlp

    def forward(self, x: Tensor) -> tuple[Tensor, MoELosses]:
        x_TH = x.reshape(-1, x.shape[-1])
        logits_TE = router_logits(x_TH, self.router_EH)
        scores = self.router(logits_TE)
        decision = decided(lambda: self._decide(scores))
        routing = decision.routing.with_scores(scores.weight(decision.selected_TE))
        if not is_replay():
            self.stats = decision.stats
        ep = ExpertParallel(
            decision.plan, self.exchange, self._observed_mlp(), overlap=self.config.dispatch.overlap
        )
        out_TH = self.experts(x_TH, routing.score_N, ep)
        if self.shared is not None:
            out_TH = out_TH + self.shared(x_TH)
        losses = MoELosses(
            load_balance=load_balance_loss(
                scores.score_TE,
                decision.balance.freq_E,
                freq_tokens=decision.balance.freq_tokens,
                num_tokens=decision.balance.all_tokens,
                top_k=self.config.top_k,
            ),
            z=z_loss(logits_TE, num_tokens=decision.balance.all_tokens),
        )
        return out_TH.view(x.shape), losses

    @torch.no_grad()
    def _decide(self, scores: Scores) -> _Decision:
        rounding = self.config.rounding
        if not self.training:
            rounding = RoundingConfig(rule="none", tile=rounding.tile)
        rounded = round_scores(scores, self.exchange, rounding)
        routing = Routing.from_mask(
            rounded.selected_TE,
            scores.weight(rounded.selected_TE),
            max_pairs=rounded.max_pairs,
        )
        plan = plan_dispatch(
            routing, self.exchange, tile=rounding.tile, from_ranks_Pe=rounded.from_ranks_Pe
        )
        changed_TE = rounded.selected_TE ^ scores.chosen_TE
        stats = MoEStats(
            freq_E=rounded.freq_E,
            target_E=rounded.target_E,
            dropped=(changed_TE & scores.chosen_TE).sum(),
            added=(changed_TE & rounded.selected_TE).sum(),
            without_expert=(~rounded.selected_TE.any(1)).sum(),
            rows_sent=plan.rows_sent(),
            copies_sent=plan.copies_sent(),
        )
        balance = self._balance_counts(scores, rounded)
        return _Decision(routing, rounded.selected_TE, plan, stats, balance)

    def _balance_counts(self, scores: Scores, rounded: Rounded) -> _BalanceCounts:
        group = self.loss_group
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        if group is None or dist.get_world_size(group) == 1:
            return _BalanceCounts(rounded.freq_E, rounded.num_tokens, rounded.num_tokens)
        # Filled on the device: a copy from the host would wait for it.
        own_tokens = rounded.freq_E.new_full((1,), len(scores.key_TE))
        counts = torch.cat([scores.chosen_TE.sum(0), own_tokens])
        dist.all_reduce(counts, group=group)
        if self.config.load_balance_scope == "ep":
            return _BalanceCounts(rounded.freq_E, rounded.num_tokens, counts[-1])
        return _BalanceCounts(counts[:-1], counts[-1], counts[-1])


def _check(config: MoEConfig, num_ranks: int) -> None:
    activation_called(config.activation)
    groups = config.rounding.balance_groups or num_ranks
    problems = [
        (config.hidden_size < 1, f"hidden_size is {config.hidden_size}; it must be at least 1"),
        (
            not 1 <= config.top_k <= config.num_experts,
            f"top_k is {config.top_k}; it must be in 1..num_experts ({config.num_experts})",
        ),
        (
            config.num_experts % num_ranks != 0,
            f"num_experts is {config.num_experts}; the {num_ranks} ranks must divide it",
        ),
        (
            config.num_experts % groups != 0,
            f"rounding.balance_groups is {groups}; it must divide num_experts "
            f"({config.num_experts})",
        ),
        (config.rounding.tile < 1, f"rounding.tile is {config.rounding.tile}; at least 1"),
    ]
    for wrong, message in problems:
        if wrong:
            raise ValueError(message)
