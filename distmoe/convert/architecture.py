"""What has to be known of an architecture: its settings and its tensors, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from distmoe.config import Config, ConfigError
from distmoe.registry import ARCHITECTURES

REQUIRED = object()


def same(value: Any, others: Any) -> Any:
    return value


def number(value: Any, others: Any) -> float:
    try:
        return float(value)
    except (ValueError, TypeError):
        raise ValueError("be a number") from None


@dataclass(frozen=True)
class Field:
    """A key of config.json that says what one of our settings says.

    ``default``: of transformers, where config.json leaves the key out. ``to_setting`` is given all
    of config.json, too, and ``to_key`` all settings; each raises ValueError, what the value must
    be, for one that has no counterpart. ``alias``: another name that some versions of transformers
    write.
    """

    key: str
    setting: str
    default: Any = REQUIRED
    to_setting: Callable[[Any, Mapping[str, Any]], Any] = same
    to_key: Callable[[Any, Config], Any] = same
    alias: str = ""

    def name_in(self, hf: Mapping[str, Any]) -> str:
        """What config.json calls the key."""
        return self.alias if self.alias in hf else self.key

    def read(self, hf: Mapping[str, Any]) -> Any:
        """The value in config.json, or the default."""
        return hf.get(self.name_in(hf), self.default)


@dataclass(frozen=True)
class Only:
    """The one value of a key of config.json, which is its default, that our model can compute."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Architecture:
    """``model_type`` and ``class_name`` are those of config.json.

    ``fixed``: our settings that the architecture decides, first the value that an import sets, then
    others that compute the same. ``initial``: those that an import sets and that an export may find
    otherwise. ``written``: keys of config.json that an export always writes. ``derives_head_dim``:
    config.json has none. ``names``: our tensors -> those of Hugging Face that are joined along the
    first dim; ``{layer}`` and ``{expert}`` are numbers, and experts are stacked.
    """

    model_type: str
    class_name: str
    fields: tuple[Field, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    only: Mapping[str, Only]
    names: Mapping[str, tuple[str, ...]] = field(repr=False)
    initial: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    derives_head_dim: bool = False


def architecture_called(model_type: Any) -> Architecture:
    """The architecture of a config.json; ConfigError if it is not known."""
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"model_type is {model_type!r}; it must be one of {known}")
    architecture: Architecture = ARCHITECTURES.load(model_type)
    return architecture
