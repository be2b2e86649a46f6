import dataclasses
import string
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distmoe.config import Config, ConfigError, load_config, to_toml
from distmoe.config.keys import key_types, value_of, with_values


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def problems(path: Path, *options: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, options)
    return caught.value.problems


def values(kind: Any) -> st.SearchStrategy[Any]:
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    text = st.text(st.characters(exclude_categories=["Cs"]))
    return {
        tuple[str, ...]: st.lists(text).map(tuple),
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False),
        str: text,
    }[kind]


@given(data=st.data())
def test_toml_gives_the_same_config_back(data: st.DataObject, tmp_path_factory: Any) -> None:
    changed = data.draw(
        st.fixed_dictionaries({}, optional={key: values(kind) for key, kind in key_types().items()})
    )
    config = with_values(Config(), changed)
    path = write(tmp_path_factory.getbasetemp(), "round_trip.toml", to_toml(config))
    again = load_config(path)
    assert again == config
    assert to_toml(again) == to_toml(config)


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "empty.toml", "")) == Config()


def test_extends_is_relative_to_the_file_and_its_own_values_win(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "a.toml", "[moe]\ntop_k = 2\nnum_experts = 32\n[train]\nsteps = 7")
    write(tmp_path, "b.toml", 'extends = "a.toml"\n[moe]\ntop_k = 3\n[moe.rounding]\ntile = 64')
    path = write(tmp_path / "sub", "c.toml", 'extends = "../b.toml"\n[moe.rounding]\nrule = "none"')
    config = load_config(path)
    assert (config.moe.top_k, config.moe.num_experts, config.train.steps) == (3, 32, 7)
    assert (config.moe.rounding.tile, config.moe.rounding.rule) == (64, "none")


def test_circle_of_extends_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", 'extends = "b.toml"')
    write(tmp_path, "b.toml", 'extends = "a.toml"')
    (problem,) = problems(tmp_path / "a.toml")
    assert problem.startswith("extends goes in a circle: ")
    assert problem.count("a.toml") == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[moe]\nnum_expert = 8",
            "unknown key 'moe.num_expert' in FILE; did you mean 'moe.num_experts'?",
        ),
        ("[modle]\nn_layers = 8", "unknown key 'modle' in FILE; did you mean 'model'?"),
        (
            "[moe.roundng]\ntile = 8",
            "unknown key 'moe.roundng' in FILE; did you mean 'moe.rounding'?",
        ),
        ("[moe]\ntile = 8", "unknown key 'moe.tile' in FILE; did you mean 'moe.rounding.tile'?"),
        ("top_k = 8", "unknown key 'top_k' in FILE; did you mean 'moe.top_k'?"),
        ("[moe]\ntop_k = '8'", "moe.top_k is '8' in FILE; it must be an integer"),
        ("[moe]\ntop_k = true", "moe.top_k is True in FILE; it must be an integer"),
        ("[moe]\ntop_k = 2.0", "moe.top_k is 2.0 in FILE; it must be an integer"),
        ("[moe.top_k]\nx = 1", "moe.top_k is {'x': 1} in FILE; it must be an integer"),
        ("[optim]\nlr = true", "optim.lr is True in FILE; it must be a number"),
        (
            "[metrics]\ntensorboard = 1",
            "metrics.tensorboard is 1 in FILE; it must be true or false",
        ),
        ("[run]\nname = 1", "run.name is 1 in FILE; it must be a string"),
        (
            "[run]\ndevice = 'tpu'",
            "run.device is 'tpu' in FILE; it must be one of 'auto', 'cpu', 'cuda'",
        ),
        ("moe = 3", "moe is 3 in FILE; it must be a table, [moe]"),
        ("extends = 3", "extends is 3 in FILE; it must be the path of a TOML file"),
        (
            "[data]\nxyz = 1",
            "unknown key 'data.xyz' in FILE; known in data: "
            + ", ".join(field.name for field in dataclasses.fields(Config().data)),
        ),
    ],
)
def test_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, "wrong.toml", text)
    assert problems(path) == [expected.replace("FILE", str(path))]


def test_all_wrong_keys_of_a_file_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path, "wrong.toml", "[moe]\ntopk = 1\ntop_k = 'x'\n[train]\nstep = 1")
    assert len(problems(path)) == 3


def test_error_of_a_base_names_the_base(tmp_path: Path) -> None:
    base = write(tmp_path, "base.toml", "[moe]\ntopk = 1")
    (problem,) = problems(write(tmp_path, "run.toml", 'extends = "base.toml"'))
    assert str(base) in problem


def test_missing_and_broken_files(tmp_path: Path) -> None:
    path = write(tmp_path, "quickstart.toml", "[moe\n")
    (problem,) = problems(path)
    assert problem.startswith(f"config file '{path}' cannot be read: ")
    (problem,) = problems(tmp_path / "quickstar.toml")
    assert problem == (
        f"there is no config file '{tmp_path}/quickstar.toml'; did you mean '{path}'?"
    )


def test_integer_is_a_number(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "run.toml", "[optim]\nlr = 1"))
    assert type(config.optim.lr) is float


@given(st.sampled_from(sorted(key_types())), st.sampled_from(string.ascii_lowercase + "_"))
def test_a_key_with_one_letter_too_many_finds_its_neighbour(key: str, letter: str) -> None:
    from distmoe.config.keys import suggestion

    if key + letter not in key_types() and len(key.rpartition(".")[2]) > 2:
        assert suggestion(key + letter) == f"did you mean '{key}'?"


def test_every_key_can_be_read_and_replaced() -> None:
    for key in key_types():
        config = with_values(Config(), {key: "mark"})
        assert value_of(config, key) == "mark"
