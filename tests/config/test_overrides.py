import pytest

from distmoe.config import Config, ConfigError, apply_overrides


def test_options_win_over_the_config() -> None:
    config = apply_overrides(
        Config(), ["--train.steps", "50", "--moe.rounding.rule=none", "--optim.weight-decay", "1"]
    )
    assert (config.train.steps, config.moe.rounding.rule) == (50, "none")
    assert config.optim.weight_decay == 1.0
    assert config.moe.rounding.tile == Config().moe.rounding.tile


@pytest.mark.parametrize(
    ("options", "on"),
    [
        (["--metrics.tensorboard"], True),
        (["--metrics.no-tensorboard"], False),
        (["--metrics.no_tensorboard"], False),
        (["--metrics.tensorboard", "false"], False),
        (["--metrics.tensorboard", "True"], True),
        (["--metrics.tensorboard=false"], False),
        (["--metrics.tensorboard", "--train.steps", "3"], True),
    ],
)
def test_switches(options: list[str], on: bool) -> None:
    assert apply_overrides(Config(), options).metrics.tensorboard is on


@pytest.mark.parametrize(
    "options",
    [
        ["--data.mix", "a:1", "b:2"],
        ["--data.mix", "a:1", "--train.steps", "3", "--data.mix", "b:2"],
        ["--data.mix=a:1", "--data.mix=b:2"],
    ],
)
def test_a_list_is_all_that_was_given(options: list[str]) -> None:
    assert apply_overrides(Config(), options).data.mix == ("a:1", "b:2")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--moe.num_expert 4", "unknown option '--moe.num_expert'; did you mean 'moe.num_experts'"),
        ("--moe.num-expert 4", "unknown option '--moe.num-expert'; did you mean 'moe.num_experts'"),
        ("--mo.top_k=4", "unknown option '--mo.top_k'; did you mean 'moe.top_k'?"),
        ("--steps 4", "unknown option '--steps'; did you mean 'train.steps'?"),
        ("--train-steps 4", "unknown option '--train-steps'; did you mean 'train.steps'?"),
        ("--moe 4", "unknown option '--moe'"),
        ("--moe.no-top-k", "unknown option '--moe.no-top-k'; did you mean 'moe.top_k'?"),
        ("--train.steps x", "Error parsing --train.steps: invalid literal for int()"),
        ("--train.steps", "Missing value for argument '--train.steps'"),
        ("--run.device tpu", "invalid choice 'tpu' for argument '--run.device'"),
        ("--metrics.tensorboard 3", "metrics.tensorboard is '3'; it must be true or false"),
        ("stray", "Unrecognized options: stray"),
    ],
)
def test_wrong_option_is_refused_in_one_line(options: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Config(), options.split())
    (problem,) = caught.value.problems
    assert problem.startswith(expected)
    assert not set("│╭╯─\n") & set(problem)
