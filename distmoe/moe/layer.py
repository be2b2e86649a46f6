"""The mixture-of-experts layer: route, round, dispatch, experts, combine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmoe.comm import make_exchange
from distmoe.config import MoEConfig, RoundingConfig
from distmoe.kernels.moe_mlp import load_backend
from distmoe.kernels.router_logits import router_logits
from distmoe.moe.dispatch import plan_dispatch
from distmoe.moe.ep_function import ExpertParallel
from distmoe.moe.experts import Experts
from distmoe.moe.mlp import SwiGluMlp
from distmoe.moe.plan import DispatchPlan
from distmoe.moe.routing_tape import decided, is_replay
from distmoe.moe.stats import MoEStats
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
class _Decision:
    """Everything of a forward that carries no gradient, and that a replay must not make again."""

    routing: Routing
    plan: DispatchPlan
    stats: MoEStats
    balance_freq_E: Tensor
    freq_tokens: int
    all_tokens: int


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
        self.mlp = load_backend(config.kernel)
        self.router = make_router(config.router, top_k=config.top_k, renormalize=config.renormalize)
        self.router_EH = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.experts = Experts(
            num_local=config.num_experts // num_ranks,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
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

    def forward(self, x: Tensor) -> tuple[Tensor, MoELosses]:
        x_TH = x.reshape(-1, x.shape[-1])
        logits_TE = router_logits(x_TH, self.router_EH)
        scores = self.router(logits_TE)
        decision = decided(lambda: self._decide(scores))
        routing = decision.routing.with_scores(scores.weight(routing_mask(decision.routing)))
        if not is_replay():
            self.stats = decision.stats
        ep = ExpertParallel(
            decision.plan, self.exchange, self.mlp, overlap=self.config.dispatch.overlap
        )
        out_TH = self.experts(x_TH, routing.score_N, ep)
        if self.shared is not None:
            out_TH = out_TH + self.shared(x_TH)
        losses = MoELosses(
            load_balance=load_balance_loss(
                scores.score_TE,
                decision.balance_freq_E,
                freq_tokens=decision.freq_tokens,
                num_tokens=decision.all_tokens,
                top_k=self.config.top_k,
            ),
            z=z_loss(logits_TE, num_tokens=decision.all_tokens),
        )
        return out_TH.view(x.shape), losses

    @torch.no_grad()
    def _decide(self, scores: Scores) -> _Decision:
        rounding = self.config.rounding
        if not self.training:
            rounding = RoundingConfig(rule="none", tile=rounding.tile)
        rounded = round_scores(scores, self.exchange, rounding)
        routing = Routing.from_mask(rounded.selected_TE, scores.weight(rounded.selected_TE))
        plan = plan_dispatch(routing, self.exchange, tile=rounding.tile)
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
        return _Decision(routing, plan, stats, *self._balance_counts(scores, rounded))

    def _balance_counts(self, scores: Scores, rounded: Rounded) -> tuple[Tensor, int, int]:
        """Top-k pairs per expert for the load-balance loss, their tokens, and all ranks' tokens."""
        group = self.loss_group
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        if group is None:
            return rounded.freq_E, rounded.num_tokens, rounded.num_tokens
        own_tokens = torch.tensor([len(scores.key_TE)], device=scores.key_TE.device)
        counts = torch.cat([scores.chosen_TE.sum(0), own_tokens])
        dist.all_reduce(counts, group=group)
        all_tokens = int(counts[-1])
        if self.config.load_balance_scope == "ep":
            return rounded.freq_E, rounded.num_tokens, all_tokens
        return counts[:-1], all_tokens, all_tokens


def routing_mask(routing: Routing) -> Tensor:
    """[T, E] bool of the pairs of a routing."""
    mask_TE = torch.zeros(
        routing.num_tokens, routing.num_experts, dtype=torch.bool, device=routing.token_N.device
    )
    mask_TE[routing.token_N.long(), routing.expert_N.long()] = True
    return mask_TE


def _check(config: MoEConfig, num_ranks: int) -> None:
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
