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
    ``busy_s``: what the rank computes, copies and launches; ``sent``: all transfers, there and
    home."""

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
    """The profile in the units of one layer: seconds of a pair, a copied row, a transfer.
    ``packs``: rows are turned into the form in which they travel, and back, each like a copy."""

    profile: Profile
    per_node: int
    row_bytes: int
    there_bytes: int
    home_bytes: int
    packs: bool
    pair_s: float

    @staticmethod
    def of(shape: LayerShape, layout: RankLayout, profile: Profile) -> LayerOnMachine:
        """ValueError if the profile has no rate of the dtype."""
        pair_s = shape.flops_per_pair / expert_flops(profile, shape, layout.num_ranks)
        return LayerOnMachine(
            profile,
            layout.per_node,
            shape.row_bytes,
            shape.there_bytes,
            shape.home_bytes,
            packs=shape.there_bytes != shape.row_bytes,
            pair_s=pair_s,
        )

    def there(self, step: ModelStep) -> Transfer:
        """Of rows, on links that do nothing else."""
        return self._transfer(step, self.there_bytes)

    def home(self, step: ModelStep) -> Transfer:
        """Of the partial sums of a step."""
        return self._transfer(step, self.home_bytes)

    def _transfer(self, step: ModelStep, row_bytes: int) -> Transfer:
        node_s = self._parcel_s("node", step.node, row_bytes)
        remote_s = self._parcel_s("remote", step.remote, row_bytes)
        seconds = node_s + remote_s if step.relayed else max(node_s, remote_s)
        return Transfer(seconds, node_s, remote_s)

    def _parcel_s(self, name: str, parcel: Parcel, row_bytes: int) -> float:
        if not parcel.messages:
            return 0.0
        link = self.profile.link(name)
        rate = link.rate_of_a_rank(self.per_node)
        seconds = parcel.messages * link.latency_s + parcel.rows * row_bytes / rate
        return self.profile.host_latency_s + seconds

    def copy_s(self, rows: float) -> float:
        """Of ``rows`` inside the device; nothing to copy takes no launch."""
        own = self.profile.link("own")
        return own.latency_s + rows * self.row_bytes / own.bytes_per_s if rows else 0.0

    def pack_s(self, rows: float) -> float:
        """Of packing or unpacking, where there is any."""
        return self.copy_s(rows) if self.packs else 0.0

    def run_s(self, pairs: float) -> float:
        return self.profile.host_latency_s + pairs * self.pair_s


def time_of_pass(
    machine: LayerOnMachine,
    steps: Sequence[ModelStep],
    *,
    tokens: float,
    own_pairs: float,
    own_rows: float,
    wgrad: bool,
) -> PassTime:
    """``own_pairs`` run in halves, before and after the blocks of ``steps``; alone in one block.
    Rows of ``tokens`` are packed before all, those that arrive unpacked before they are run."""
    pairs = own_pairs + sum(step.pairs for step in steps)
    wgrad_s = machine.run_s(pairs) if wgrad else 0.0
    packed_s = machine.pack_s(tokens)
    if not steps:
        alone = 2 * packed_s + machine.run_s(pairs) + wgrad_s
        return PassTime(alone, alone, alone, Transfer())
    gather_s = [machine.copy_s(step.sent_rows) for step in steps]
    placed_s = packed_s + sum(gather_s) + machine.copy_s(own_rows)
    sum_s = machine.copy_s(own_rows + sum(step.sent_rows for step in steps))
    half_s = machine.run_s(own_pairs / 2)
    block_s = [machine.pack_s(step.arriving_rows) + machine.run_s(step.pairs) for step in steps]
    busy_s = placed_s + 2 * half_s + sum(block_s) + wgrad_s + sum_s

    there, home = [machine.there(step) for step in steps], [machine.home(step) for step in steps]
    ways, last, relayed = sum(there, Transfer()), home[-1], steps[-1].relayed
    first_s = packed_s + gather_s[0]
    relay_s = there[-1].node_s if relayed else 0.0
    all_here = first_s + max(ways.node_s, ways.remote_s + relay_s)
    begun = max(first_s + there[0].seconds, placed_s + half_s)
    computed = max(begun + sum(block_s), all_here + block_s[-1])
    before = home[-2] if len(steps) > 1 else Transfer()
    before_s = before.remote_s if last.remote_s else before.node_s
    # Rows of the own node are home when others are relayed: nothing is sent during the last block.
    idle_s = block_s[-1] if relayed else 0.0
    sent = sum(home, ways)
    links_free = first_s + max(sent.node_s + idle_s, sent.remote_s)
    all_home = max(computed + max(half_s, before_s) + last.seconds, links_free)
    return PassTime(
        serial_s=busy_s + sent.seconds,
        # Not below it by a rounding error.
        overlapped_s=max(busy_s, max(all_home, computed + half_s + wgrad_s) + sum_s),
        busy_s=busy_s,
        sent=sent,
    )
