"""Time of the collectives that carry parameters and gradients, over groups of a job's ranks.

A ring over n ranks moves (n - 1) / n of the tensor past every rank. Where the group spans nodes,
each node receives what the others hold, through the links of all its members together; inside the
node every member receives all of it. The slower of the two decides. Of the n - 1 steps of the ring
as many cross nodes as there are other nodes; each takes the latency of its link, as in NCCL's model
of a ring (src/graph/tuning.cc). Its trees, and reductions in the switch, are not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass

from distmoe.planner.machine_profile import Profile


@dataclass(frozen=True)
class RankGroup:
    """``size`` ranks, ``per_node`` of them on each node that the group touches."""

    size: int
    per_node: int

    @staticmethod
    def strided(size: int, *, stride: int, ranks_per_node: int) -> RankGroup:
        """Ranks r, r + stride, r + 2 stride, ...; nodes hold runs of ``ranks_per_node`` ranks."""
        return RankGroup(size, max(1, min(size, ranks_per_node // stride)))

    @property
    def num_nodes(self) -> int:
        return -(-self.size // self.per_node)


@dataclass(frozen=True)
class Transfer:
    """Seconds of a collective, and for how long it occupies each link class."""

    seconds: float = 0.0
    node_s: float = 0.0
    remote_s: float = 0.0

    def __add__(self, other: Transfer) -> Transfer:
        """One after the other."""
        return Transfer(
            self.seconds + other.seconds,
            self.node_s + other.node_s,
            self.remote_s + other.remote_s,
        )


@dataclass(frozen=True)
class Collectives:
    """On the links of ``profile``, with ``ranks_per_node``."""

    profile: Profile
    ranks_per_node: int

    def gather(self, group: RankGroup, num_bytes: float) -> Transfer:
        """An all-gather of a tensor of ``num_bytes`` in all."""
        return self._ring(group, num_bytes, self.profile.collective_share.get("gather", 1.0))

    def reduce(self, group: RankGroup, num_bytes: float) -> Transfer:
        """Its reduce-scatter."""
        return self._ring(group, num_bytes, self.profile.collective_share.get("reduce", 1.0))

    def all_reduce(self, group: RankGroup, num_bytes: float) -> Transfer:
        """Reduce-scatter and all-gather."""
        return self.reduce(group, num_bytes) + self.gather(group, num_bytes)

    def all_to_all(self, group: RankGroup, num_bytes: float) -> Transfer:
        """Every rank keeps a part of ``num_bytes`` and sends the others theirs, all at once."""
        if group.size == 1 or not num_bytes:
            return Transfer()
        latency = node_s = remote_s = 0.0
        if group.per_node > 1:
            link = self.profile.link("node")
            latency = link.latency_s
            node_s = num_bytes * (group.per_node - 1) / group.size / link.bytes_per_s
        if group.num_nodes > 1:
            link = self.profile.link("remote")
            latency = max(latency, link.latency_s)
            rate = link.rate_of_a_rank(self.ranks_per_node)
            remote_s = num_bytes * (group.size - group.per_node) / group.size / rate
        return Transfer(latency + max(node_s, remote_s), node_s, remote_s)

    def _ring(self, group: RankGroup, num_bytes: float, share: float) -> Transfer:
        """``share``: what the transport reaches of the links."""
        if group.size == 1 or not num_bytes:
            return Transfer()
        latency = node_s = remote_s = 0.0
        if group.per_node > 1:
            link = self.profile.link("node")
            latency += (group.size - group.num_nodes) * link.latency_s
            node_s = num_bytes * (group.size - 1) / group.size / link.bytes_per_s
        if group.num_nodes > 1:
            link = self.profile.link("remote")
            rate = link.rate_of_a_rank(self.ranks_per_node)
            latency += (group.num_nodes - 1) * link.latency_s
            missing = num_bytes * (group.num_nodes - 1) / group.num_nodes
            remote_s = missing / (rate * group.per_node)
        return Transfer((latency + max(node_s, remote_s)) / share, node_s / share, remote_s / share)
