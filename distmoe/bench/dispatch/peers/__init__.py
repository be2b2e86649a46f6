"""Other people's ways to move the rows of a layer: a file each, which imports its package when it
is loaded, and one line in the table.

A peer module has ``subject(layer) -> Subject``, collective over the ranks of the layer; it raises
ValueError for a layer that the peer cannot compute.
"""

from __future__ import annotations

import importlib

from distmoe.bench.dispatch.layer import Layer
from distmoe.bench.dispatch.subjects import Subject

PEERS = {
    "all_to_all": "distmoe.bench.dispatch.peers.all_to_all",
    "deepspeed": "distmoe.bench.dispatch.peers.deepspeed_moe",
}


class MissingPeerError(Exception):
    """A peer is not installed, or cannot compute the layer; one line says why."""


def load_peer(name: str, layer: Layer) -> Subject:
    """The peer called ``name`` for ``layer``; `MissingPeerError` if it cannot be used here."""
    try:
        subject: Subject = importlib.import_module(PEERS[name]).subject(layer)
    except (ImportError, ValueError) as error:
        raise MissingPeerError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    return subject
