"""The mixture-of-experts layer: route, round, dispatch, experts, combine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmoe.comm import Exchange, Observer, make_exchange
from distmoe.comm.group_sum import GroupSum
from distmoe.comm.node_links import NodeGroups, NodeLinks
from distmoe.comm.torch_group import check_group, several_ranks
from distmoe.config import MoEConfig, RoundingConfig, expert_groups
from distmoe.kernels.moe_mlp import MoeMlp, backend_for, load_backend
from distmoe.kernels.moe_mlp.find_tiles import find_tiles
from distmoe.kernels.router_logits import router_logits
from distmoe.moe.autocast import autocast
from distmoe.moe.balance_counts import BalanceCounts, OwnCounts, balance_counts, own_counts
from distmoe.moe.check import check_layer
from distmoe.moe.check_input import check_input
from distmoe.moe.dispatch import Dispatch
from distmoe.moe.ep_function import ExpertParallel
from distmoe.moe.experts import Experts
from distmoe.moe.layer_groups import node_groups_for, schedule_for
from distmoe.moe.mlp import SwiGluMlp
from distmoe.moe.routing_tape import decided, is_recomputed
from distmoe.moe.row_formats import TravelFormats
from distmoe.moe.stats import MoEStats
from distmoe.moe.step_counts import StepCounts
from distmoe.moe.timed_mlp import TimedMlp
from distmoe.named_range import is_profiling, named_range
from distmoe.routing.group_limit import group_limit
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
    rounded: Rounded
    dispatch: Dispatch
    balance: Callable[[], BalanceCounts]


class MoE(nn.Module):
    """x [..., H] -> (out [..., H], losses): a drop-in MLP whose experts live on many ranks.

    ``ep_group``: ranks that share the experts; each holds num_experts / P of them, in rank order,
    and calls the layer with its own tokens. None: this rank alone. ``loss_group``: ranks over
    whose tokens the router losses are taken; by default all ranks, if a process group exists.
    ``cp_group``: ranks that have parts of the same sequences. None: sequences are whole.
    ``ranks_per_node``: consecutive ranks of ``ep_group`` on one machine, 0 for all of them;
    ``node_groups``: made for it before, else every layer makes its own.
    ``name``: in profiles, traces and warnings.
    x and the parameters have one dtype, or torch.autocast gives them one; ValueError if not.
    Training rounds, evaluation is plain top-k. ``stats`` tells what the last forward did.
    ``on_scores``, if set, is called with the scores of every decision; a recomputed forward makes
    none.

    An optimizer step of several micro-batches calls `begin_step` before the first; otherwise the
    load-balance loss is that of each forward by itself. With config.bias_update_rate > 0 the layer
    has ``bias_E`` int32, which `moe.expert_bias.update_expert_bias` moves after a step.
    """

    stats: MoEStats
    bias_E: Tensor | None
    on_scores: Callable[[Scores], None] | None = None

    def __init__(
        self,
        config: MoEConfig,
        ep_group: dist.ProcessGroup | None = None,
        *,
        loss_group: dist.ProcessGroup | None = None,
        cp_group: dist.ProcessGroup | None = None,
        ranks_per_node: int = 0,
        node_groups: NodeGroups | None = None,
        name: str = "MoE layer",
    ) -> None:
        super().__init__()
        check_group("ep_group", ep_group)
        check_group("loss_group", loss_group)
        check_group("cp_group", cp_group)
        num_ranks = dist.get_world_size(ep_group) if ep_group is not None else 1
        check_layer(config, num_ranks, ranks_per_node=ranks_per_node)
        self.config, self.name = config, name
        self.loss_group = loss_group
        self._sequence_sums = None if cp_group is None else GroupSum(cp_group)
        self._connect(ep_group, ranks_per_node, node_groups)
        self._mlp: MoeMlp | None = None
        self.router = make_router(config.router, top_k=config.top_k, renormalize=config.renormalize)
        limit = expert_groups(config, ep=num_ranks, ranks_per_node=ranks_per_node)
        self.group_limit = group_limit(config, limit)
        self.step_counts = StepCounts()
        # In units of keys, so that decisions with it are exact.
        bias_E = torch.zeros(config.num_experts, dtype=torch.int32)
        self.register_buffer("bias_E", bias_E if config.bias_update_rate > 0 else None)
        self.router_EH = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.experts = Experts(
            num_local=config.num_experts // num_ranks,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            activation=config.activation,
            are_all=num_ranks == 1,
        )
        self.shared: SwiGluMlp | None = None
        if config.shared_intermediate_size:
            self.shared = SwiGluMlp(config.hidden_size, config.shared_intermediate_size)
        if self.router_EH.device.type != "meta":
            self.reset_parameters()

    def _connect(
        self,
        ep_group: dist.ProcessGroup | None,
        ranks_per_node: int,
        node_groups: NodeGroups | None,
    ) -> None:
        """Make all that carries messages."""
        loss_ranks = several_ranks(self.loss_group)
        self._loss_sums = None if loss_ranks is None else GroupSum(loss_ranks)
        transport = self.config.dispatch.exchange
        self.exchange = make_exchange(ep_group, transport, ranks_per_node=ranks_per_node)
        self.schedule = schedule_for(self.config, self.exchange.size, ranks_per_node)
        self.travel = TravelFormats.of(self.config.dispatch)
        node_groups = node_groups or node_groups_for(self.config, ep_group, ranks_per_node)
        self.links = None if node_groups is None else NodeLinks.over(node_groups, transport)
        for observer in self.observers():
            observer.layer = self.name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # The weights may live elsewhere now.
        self._mlp = None
        return self

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """N(0, std^2) from torch's default generator; seed ranks apart, or experts start equal.
        The bias is 0."""
        for parameter in self.parameters():
            parameter.normal_(0.0, std)
        if self.bias_E is not None:
            self.bias_E.zero_()

    def begin_step(self) -> None:
        """The forwards in training from here on are of one optimizer step: what they choose adds
        up, for the load-balance loss and the bias. What was counted before is forgotten."""
        self.step_counts.begin()

    @property
    def mlp(self) -> MoeMlp:
        """The backend, picked in the first forward: where the weights will live is known then."""
        if self._mlp is None:
            name = backend_for(self.config.kernel, self.router_EH.device)
            tiles = find_tiles(self.config.kernel_tiles, name, self.router_EH.device)
            self._mlp = load_backend(name, self.config.activation, tiles=tiles)
        return self._mlp

    def exchanges(self) -> list[Exchange]:
        """All that carry messages of this layer."""
        return [self.exchange, *(self.links.all() if self.links is not None else ())]

    def observers(self) -> list[Observer]:
        """All that see a wait of this layer."""
        of_loss = [sums.observer for sums in (self._loss_sums, self._sequence_sums) if sums]
        return [*(exchange.observer for exchange in self.exchanges()), *of_loss]

    def _observed_mlp(self) -> MoeMlp:
        observer = self.exchange.observer
        watched = observer.is_timing or is_profiling()
        return TimedMlp(self.mlp, observer) if watched else self.mlp

    def _named(self, name: str) -> AbstractContextManager[object]:
        return named_range(name, layer=self.name)

    def forward(self, x: Tensor) -> tuple[Tensor, MoELosses]:
        check_input(x, self, hidden_size=self.config.hidden_size)
        x_TH = autocast(x.reshape(-1, x.shape[-1]))
        with self._named("router"):
            logits_TE = router_logits(x_TH, autocast(self.router_EH))
            scores = self._score(logits_TE)
        num_sequences = x.shape[:-2].numel()
        decision = decided(lambda: self._decide(scores, num_sequences))
        # While the sizes of what arrives are on their way.
        routing = decision.routing.first(decision.dispatch.num_own_pairs)
        score_N = routing.with_scores(scores.weight(decision.rounded.selected_TE)).score_N
        with self._named("dispatch, plan"):
            source = self.travel.pack(x_TH.detach())
            gathered = decision.dispatch.gather(source)
            plan = decision.dispatch.plan()
        ep = ExpertParallel(
            plan,
            self.exchange,
            self._observed_mlp(),
            overlap=self.config.dispatch.overlap,
            links=self.links,
            travel=self.travel,
            layer=self.name,
        )
        rows = ep.post_rows(source, gathered)
        # The rows keep them as long as they travel.
        del source, gathered
        # While the first rows travel.
        shared_TH = self._shared_expert(x_TH)
        out_TH = self.experts(x_TH, score_N, ep, rows)
        if not is_recomputed():
            # Behind the experts, as the device idles while the host enqueues what comes before.
            self.stats = MoEStats.count(scores, decision.rounded).with_rows_of(plan)
        if shared_TH is not None:
            out_TH = out_TH + shared_TH
        # Autograd goes back in the order of making: first here, then through the experts. A loss
        # whose backward came after theirs would have FSDP gather the layer a second time. And only
        # here does anybody wait for ranks of other ep groups.
        losses = self._losses(scores, logits_TE, decision.balance())
        return out_TH.view(x.shape), losses

    def _shared_expert(self, x_TH: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        with self._named("shared expert"):
            shared_TH: Tensor = self.shared(x_TH)
        return shared_TH

    def _losses(self, scores: Scores, logits_TE: Tensor, balance: BalanceCounts) -> MoELosses:
        return MoELosses(
            load_balance=load_balance_loss(
                scores.prob_TE,
                balance.freq_E,
                freq_tokens=balance.freq_tokens,
                num_tokens=balance.all_tokens,
                top_k=self.config.top_k,
            ),
            z=z_loss(logits_TE, num_tokens=balance.all_tokens),
        )

    def _score(self, logits_TE: Tensor) -> Scores:
        scores = self.router(logits_TE, self.bias_E)
        if self.group_limit is not None:
            scores = self.group_limit(scores)
        return replace(scores, scale=self.config.score_scale)

    @torch.no_grad()
    def _decide(self, scores: Scores, num_sequences: int) -> _Decision:
        rounding = self.config.rounding
        if not self.training:
            rounding = RoundingConfig(rule="none", tile=rounding.tile)
        with self._named("rounding"):
            rounded = round_scores(scores, self.exchange, rounding)
        routing = Routing.from_mask(
            rounded.selected_TE,
            scores.weight(rounded.selected_TE),
            max_pairs=rounded.max_pairs,
        )
        dispatch = Dispatch(
            routing,
            self.exchange,
            tile=rounding.tile,
            schedule=self.schedule,
            links=self.links,
            from_ranks_Pe=rounded.from_ranks_Pe,
        )
        # Posted on every rank before the pairs, whatever their groups: one order everywhere.
        balance = self._balance_counts(scores, rounded, num_sequences)
        with self._named("dispatch, pairs"):
            dispatch.exchange_pairs()
        if self.on_scores is not None and not is_recomputed():
            self.on_scores(scores)
        return _Decision(routing, rounded, dispatch, balance)

    def _balance_counts(
        self, scores: Scores, rounded: Rounded, num_sequences: int
    ) -> Callable[[], BalanceCounts]:
        forward_E1 = own_counts(scores.chosen_TE)
        # Evaluation is never counted, and a forward once. A replay never comes here.
        so_far_E1 = forward_E1
        if self.training:
            counts = self.step_counts
            so_far_E1 = (counts.so_far if is_recomputed() else counts.add)(forward_E1)
        return balance_counts(
            self.config.load_balance_scope,
            OwnCounts(forward_E1, so_far_E1, scores.chosen_TE, num_sequences),
            rounded,
            sums=self._loss_sums,
            sequence_sums=self._sequence_sums,
            ep=self.exchange.size,
        )
