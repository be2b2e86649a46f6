"""Seconds of one forward or backward of an expert layer on one rank, in closed form.

Rows arrive at the pace at which the rank sends its own. A transfer of m messages and n bytes takes
`host latency + m alpha + n / beta` of its link, a block its launch and its pairs. The rows of all
steps go there one step after the other, and home when they are computed. The longest of three
chains decides:

    the first rows there, all blocks, the last rows home       computing takes longest
    all rows there, the last block, the last rows home         sending does, in few steps
    all rows there and home                                    sending does, in many steps

The last tiles of the last step are completed by the second half of the own rows, so its rows go
home after that; those of the step before go home after the last step's block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distmoe.planner.collective_time import Transfer
from distmoe.planner.expert_rate import expert_flops
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import Profile
from distmoe.planner.pass_steps import ModelStep, Parcel
from distmoe.planner.row_volumes import RankLayout


@dataclass(frozen=True)
class PassTime:
    """Seconds of one forward or backward. ``serial_s`` waits for every transfer at once;
    ``busy_s``: what the rank computes, copies and launches; ``sent``: all transfers one way."""

    serial_s: float
    overlapped_s: float
    busy_s: float
    sent: Transfer

    @property
    def exposed_share(self) -> float:
        """Of the overlapped time, in which the rank waits for communication."""
        return 1 - self.busy_s / self.overlapped_s


@dataclass(frozen=True)
class LayerOnMachine:
    """The profile in the units of one layer: seconds of a pair, a copied row, a transfer."""

    profile: Profile
    per_node: int
    row_bytes: int
    pair_s: float

    @staticmethod
    def of(shape: LayerShape, layout: RankLayout, profile: Profile) -> LayerOnMachine:
        """ValueError if the profile has no rate of the dtype."""
        pair_s = shape.flops_per_pair / expert_flops(profile, shape, layout.num_ranks)
        return LayerOnMachine(profile, layout.per_node, shape.row_bytes, pair_s)

    def transfer(self, step: ModelStep) -> Transfer:
        """One way, on links that do nothing else."""
        node_s, remote_s = self._parcel_s("node", step.node), self._parcel_s("remote", step.remote)
        seconds = node_s + remote_s if step.relayed else max(node_s, remote_s)
        return Transfer(seconds, node_s, remote_s)

    def _parcel_s(self, name: str, parcel: Parcel) -> float:
        if not parcel.messages:
            return 0.0
        link = self.profile.link(name)
        rate = link.rate_of_a_rank(self.per_node)
        seconds = parcel.messages * link.latency_s + parcel.rows * self.row_bytes / rate
        return self.profile.host_latency_s + seconds

    def copy_s(self, rows: float) -> float:
        """Of ``rows`` inside the device; nothing to copy takes no launch."""
        own = self.profile.link("own")
        return own.latency_s + rows * self.row_bytes / own.bytes_per_s if rows else 0.0

    def run_s(self, pairs: float) -> float:
        return self.profile.host_latency_s + pairs * self.pair_s


def time_of_pass(
    machine: LayerOnMachine,
    steps: Sequence[ModelStep],
    *,
    own_pairs: float,
    own_rows: float,
    wgrad: bool,
) -> PassTime:
    """``own_pairs`` run in halves, before and after the blocks of ``steps``; alone in one block."""
    pairs = own_pairs + sum(step.pairs for step in steps)
    wgrad_s = machine.run_s(pairs) if wgrad else 0.0
    if not steps:
        alone = machine.run_s(pairs) + wgrad_s
        return PassTime(alone, alone, alone, Transfer())
    gather_s = [machine.copy_s(step.sent_rows) for step in steps]
    placed_s = sum(gather_s) + machine.copy_s(own_rows)
    sum_s = machine.copy_s(own_rows + sum(step.sent_rows for step in steps))
    half_s, block_s = machine.run_s(own_pairs / 2), [machine.run_s(step.pairs) for step in steps]
    busy_s = placed_s + 2 * half_s + sum(block_s) + wgrad_s + sum_s

    ways = [machine.transfer(step) for step in steps]
    sent, last, relayed = sum(ways, Transfer()), ways[-1], steps[-1].relayed
    first_here = gather_s[0] + ways[0].seconds
    all_here = gather_s[0] + max(sent.node_s, sent.remote_s + (last.node_s if relayed else 0.0))
    computed = max(max(first_here, placed_s + half_s) + sum(block_s), all_here + block_s[-1])
    before = ways[-2] if len(steps) > 1 else Transfer()
    before_s = before.remote_s if last.remote_s else before.node_s
    # Rows of the own node are home when others are relayed: nothing is sent during the last block.
    idle_s = block_s[-1] if relayed else 0.0
    links_free = gather_s[0] + max(2 * sent.node_s + idle_s, 2 * sent.remote_s)
    home = max(computed + max(half_s, before_s) + last.seconds, links_free)
    return PassTime(
        serial_s=busy_s + 2 * sent.seconds,
        # Not below it by a rounding error.
        overlapped_s=max(busy_s, max(home, computed + half_s + wgrad_s) + sum_s),
        busy_s=busy_s,
        sent=sent,
    )
