"""config.json of Hugging Face into our settings, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from distmoe.config import Config, ConfigError
from distmoe.config.keys import value_of
from distmoe.convert.architecture import REQUIRED, Architecture, Field, architecture_called
from distmoe.registry import ARCHITECTURES

# Transformers 5 keeps RoPE in a table, 4 has rope_scaling and, beside it, these keys.
ROPE, SCALING = "rope_parameters", "rope_scaling"
ROPE_KEYS = ("rope_theta", "partial_rotary_factor")


def settings_of(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings, by dotted key, for the model of a config.json. ConfigError, a line for every
    key, if our model cannot compute it."""
    architecture = architecture_called(hf.get("model_type"))
    flat = _flat(hf)
    problems = [*_unlike(architecture, flat), *_missing(architecture, flat)]
    if problems:
        raise ConfigError(problems)
    settings = {key: values[0] for key, values in architecture.fixed.items()}
    settings |= architecture.initial
    for field in architecture.fields:
        value = field.read(flat)
        try:
            settings |= _leaves(field.setting, field.to_setting(value, flat))
        except (ValueError, TypeError) as error:
            problems.append(f"{field.name_in(flat)} is {value!r}; it must {error}")
    if problems:
        raise ConfigError(problems)
    return settings


def hf_config_of(
    config: Config, *, source: Mapping[str, Any] | None = None, model_type: str = ""
) -> dict[str, Any]:
    """config.json for the model of a resolved run.

    ``source``: that of the model with which the run began. What it says otherwise, and in other
    words, is kept. ``model_type``: another one than the source's; neither: the first that can say
    what the settings say. ConfigError, a line for every setting, if none can.
    """
    name = model_type or (source or {}).get("model_type") or _first_that_fits(config)
    architecture = architecture_called(name)
    if problems := list(inexpressible(architecture, config)):
        raise ConfigError(problems)
    if source is not None and source.get("model_type") == name:
        hf, flat = dict(source), _flat(source)
    else:
        hf, flat = _new(architecture, config), {}
    values = {
        field.key: field.to_key(value_of(config, field.setting), config)
        for field in architecture.fields
    }
    for field in architecture.fields:
        old, new = field.read(flat), values[field.key]
        setting = field.to_setting(new, {**flat, **values})
        if not _says(setting, field, old, {**values, **flat}):
            _put(hf, field.name_in(flat), new)
    return hf | dict(architecture.written)


def inexpressible(architecture: Architecture, config: Config) -> Iterator[str]:
    """Settings that the architecture cannot express, a line each."""
    for key, values in architecture.fixed.items():
        if (value := value_of(config, key)) not in values:
            allowed = " or ".join(map(repr, values))
            yield f"{key} is {value!r}; {architecture.model_type} has {allowed}"
    for field in architecture.fields:
        value = value_of(config, field.setting)
        try:
            field.to_key(value, config)
        except ValueError as error:
            yield f"{field.setting} is {value!r}; for {architecture.model_type} it must {error}"
    model = config.model
    if architecture.derives_head_dim and model.head_dim * model.n_heads != model.hidden_size:
        yield (
            f"model.head_dim is {model.head_dim}; {architecture.model_type} has model.hidden_size "
            f"({model.hidden_size}) / model.n_heads ({model.n_heads})"
        )


def _first_that_fits(config: Config) -> str:
    why = {name: list(inexpressible(architecture_called(name), config)) for name in ARCHITECTURES}
    fitting = next((name for name, problems in why.items() if not problems), None)
    if fitting is None:
        raise ConfigError([line for problems in why.values() for line in problems])
    return fitting


def _new(architecture: Architecture, config: Config) -> dict[str, Any]:
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "max_position_embeddings": config.data.seq_len,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **{key: only.value for key, only in architecture.only.items() if only.value is not None},
    }


def _flat(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what stands in a table of it, or follows from other keys."""
    rope, heads = hf.get(ROPE) or {}, hf.get("num_attention_heads")
    flat = dict(hf)
    flat |= {key: rope[key] for key in ROPE_KEYS if key in rope}
    scaling = hf.get(SCALING) or rope
    flat[SCALING] = scaling if _kind(scaling) != "default" else None
    if flat.get("head_dim") is None and heads and hf.get("hidden_size"):
        flat["head_dim"] = hf["hidden_size"] // heads
    return flat


def _unlike(architecture: Architecture, hf: Mapping[str, Any]) -> Iterator[str]:
    """What our model cannot compute."""
    for key, only in architecture.only.items():
        if (value := hf.get(key, only.value)) != only.value:
            yield f"{key} is {value!r}; it must be {only.value!r}: {only.reason}"
    scales = any(field.key == SCALING for field in architecture.fields)
    if not scales and hf[SCALING] is not None:
        kind = _kind(hf[SCALING])
        yield f"rope_type is {kind!r}; it must be 'default': positions are not scaled"
    size, heads = hf.get("hidden_size"), hf.get("num_attention_heads")
    if architecture.derives_head_dim and size and heads and hf["head_dim"] * heads != size:
        yield (
            f"head_dim is {hf['head_dim']}; it must be hidden_size ({size}) / num_attention_heads "
            f"({heads})"
        )


def _missing(architecture: Architecture, hf: Mapping[str, Any]) -> Iterator[str]:
    for field in architecture.fields:
        if field.read(hf) in (REQUIRED, None) and field.default is REQUIRED:
            yield f"{field.key} is not in config.json; it must be there"


def _says(setting: Any, field: Field, value: Any, hf: Mapping[str, Any]) -> bool:
    """Whether the value of a key, perhaps in other words, is this setting."""
    try:
        return value is not REQUIRED and bool(field.to_setting(value, hf) == setting)
    except ValueError:
        # No setting is.
        return False


def _kind(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type", scaling.get("type", "default"))


def _leaves(setting: str, value: Any) -> dict[str, Any]:
    """A value by its dotted key; of a whole section, each of its values."""
    if not is_dataclass(value):
        return {setting: value}
    return {f"{setting}.{field.name}": getattr(value, field.name) for field in fields(value)}


def _put(hf: dict[str, Any], key: str, value: Any) -> None:
    if key == SCALING and isinstance(hf.get(ROPE), dict):
        kept = {name: hf[ROPE][name] for name in ROPE_KEYS if name in hf[ROPE]}
        hf[ROPE] = kept | (value or {"rope_type": "default"})
    elif key in ROPE_KEYS and isinstance(hf.get(ROPE), dict):
        hf[ROPE] = {**hf[ROPE], key: value}
    else:
        hf[key] = value
