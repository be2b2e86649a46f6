"""From router logits to (token, expert) pairs, rounded to tiles over the expert-parallel group."""

from distmoe.routing.round_tokens import round_tokens
from distmoe.routing.routing import Routing

__all__ = ["Routing", "round_tokens"]
