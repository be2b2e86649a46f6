"""Which tensors of Hugging Face make one of ours, and how."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from distmoe.convert.architecture import Architecture

LAYER = re.compile(r"^blocks\.(\d+)\.")


@dataclass(frozen=True)
class Sources:
    """``names_ej``: for every expert, or once, the tensors that are joined along the first dim."""

    names_ej: tuple[tuple[str, ...], ...]
    is_stacked: bool

    def parts(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name of Hugging Face and its view of our ``tensor``, to be read or filled."""
        wholes_e = tensor.unbind() if self.is_stacked else (tensor,)
        for names_j, whole in zip(self.names_ej, wholes_e, strict=True):
            yield from zip(names_j, whole.chunk(len(names_j)), strict=True)


def sources_of(name: str, architecture: Architecture, *, num_experts: int) -> Sources:
    """Of our parameter ``name``. KeyError if the architecture has no such thing."""
    layer = LAYER.match(name)
    templates = architecture.names[LAYER.sub("blocks.{layer}.", name)]
    number = layer[1] if layer else ""
    is_stacked = "{expert}" in templates[0]
    experts = range(num_experts) if is_stacked else range(1)
    names_ej = tuple(
        tuple(template.format(layer=number, expert=expert) for template in templates)
        for expert in experts
    )
    return Sources(names_ej, is_stacked)
