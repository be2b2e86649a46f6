"""RoPE's scaling by YaRN, as DeepSeek has it: a table of config.json, and a section of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distmoe.config import Config, YarnConfig
from distmoe.convert.architecture import Field

POSITIONS = "original_max_position_embeddings"
# Others, such as attention_factor, change what is computed.
KNOWN = {"rope_type", "type", "rope_theta", "factor", POSITIONS, "beta_fast", "beta_slow"}
KNOWN |= {"mscale", "mscale_all_dim"}


def _section(scaling: Mapping[str, Any] | None, hf: Mapping[str, Any]) -> YarnConfig:
    if scaling is None:
        return YarnConfig()
    if scaling.get("rope_type", scaling.get("type")) != "yarn":
        raise ValueError("be null or have rope_type 'yarn'")
    if unknown := sorted(set(scaling) - KNOWN):
        raise ValueError(f"be without {', '.join(unknown)}")
    if missing := sorted({"factor", POSITIONS} - set(scaling)):
        raise ValueError(f"have {', '.join(missing)}")
    mscale, all_dim = _number(scaling, "mscale", 0.0), _number(scaling, "mscale_all_dim", 0.0)
    if all_dim and not mscale:
        raise ValueError("have mscale with mscale_all_dim")
    positions = _number(scaling, POSITIONS)
    if not positions.is_integer():
        raise ValueError(f"have a whole number as {POSITIONS}")
    return YarnConfig(
        factor=_number(scaling, "factor"),
        original_positions=int(positions),
        beta_fast=_number(scaling, "beta_fast", 32.0),
        beta_slow=_number(scaling, "beta_slow", 1.0),
        # Transformers heeds it together with the other one only.
        mscale=mscale if all_dim else 1.0,
        mscale_all_dim=all_dim,
    )


def _number(scaling: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """``default``, if there is one, is also what null and 0 mean."""
    value = scaling.get(key)
    if not value and default is not None:
        return default
    try:
        return float(value)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        raise ValueError(f"have a number as {key}") from None


def _table(yarn: YarnConfig, config: Config) -> dict[str, Any] | None:
    if yarn.factor == 1:
        return None
    if yarn.mscale != 1 and not yarn.mscale_all_dim or yarn.mscale_all_dim and not yarn.mscale:
        raise ValueError("have mscale 1 without mscale_all_dim, and both above 0 with it")
    return {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": yarn.factor,
        POSITIONS: yarn.original_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


YARN = Field("rope_scaling", "model.yarn", None, _section, _table)
