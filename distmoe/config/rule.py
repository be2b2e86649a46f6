"""Relations between settings. A rule yields `key is VALUE; what is allowed` where one is broken.

Rules are in `layer_rules`, of the model and its MoE layers, `run_rules`, of ranks and steps, and
`file_rules`, of what has to be on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from distmoe.config.keys import value_of
from distmoe.config.schema import Config

Complaints = Callable[[Config, int], Iterator[str]]


@dataclass(frozen=True)
class Rule:
    """Complaints about a resolved config and a number of ranks, if the ranges of ``keys`` hold.
    ``of_layer``: an MoE layer by itself must follow it, too; it reads only moe and parallel.ep and
    ranks_per_node."""

    keys: tuple[str, ...]
    complaints: Complaints
    of_layer: bool = False


def adder_to(rules: list[Rule]) -> Callable[..., Callable[[Complaints], Complaints]]:
    """A decorator `rule(*keys, of_layer=False)` that adds a function to ``rules``."""

    def rule(*keys: str, of_layer: bool = False) -> Callable[[Complaints], Complaints]:
        def add(complaints: Complaints) -> Complaints:
            rules.append(Rule(keys, complaints, of_layer))
            return complaints

        return add

    return rule


def wrong(config: Config, key: str, allowed: str) -> str:
    """The complaint about a key; ``allowed``: what it must do."""
    return f"{key} is {value_of(config, key)}; it must {allowed}"
