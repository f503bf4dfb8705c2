"""The command line of every script: a number that cannot be is said in one line before the work."""

import dataclasses
import importlib
import re
from typing import get_args, get_type_hints

import pytest

from rr1.runtime import parse_config

SCRIPTS = [
    "train_sft",
    "train_grpo",
    "train_recover",
    "evaluate",
    "rr1.annotate.__main__",
    "rr1.certify",
    "rr1.u1.__main__",
    "rr1.u1.report",
    "rr1.tiny.pretrain",
]


def numbers() -> list[tuple[str, str, set]]:
    """(script, option, its kinds of number) of all numeric options."""
    found = []
    for script in SCRIPTS:
        config = importlib.import_module(script).Config
        hints = get_type_hints(config)
        for f in dataclasses.fields(config):
            kinds = {int, float} & {hints[f.name], *get_args(hints[f.name])}
            if kinds:
                found.append((script, "--" + f.name.replace("_", "-"), kinds))
    return found


def refused(script: str, *argv: str) -> bool:
    """Whether the command line is refused; if so, with status 2 and one line that says why."""
    config = importlib.import_module(script).Config
    needed = [f for f in dataclasses.fields(config) if f.default is dataclasses.MISSING]
    needed = [f for f in needed if f.default_factory is dataclasses.MISSING]
    words = [word for f in needed for word in ("--" + f.name.replace("_", "-"), "x")]
    try:
        parse_config(config, [*words, *argv])
    except SystemExit as error:
        assert error.code == 2
        return True
    return False


@pytest.mark.parametrize("script, option, kinds", numbers(), ids=lambda value: str(value))
def test_no_number_is_negative_or_not_finite(script, option, kinds, capsys):
    values = ["-1", "x"] + ["nan", "inf", "-0.1"] * (float in kinds)
    for value in values:
        if (script, option) == ("train_grpo", "--reward-weights") and value.startswith("-"):
            assert not refused(script, option, value)  # a term may be a penalty
            continue
        assert refused(script, option, value), value
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and option in said and value in said.replace(".0", "")


AT_LEAST_ONE = {
    "train_sft": "batch micro-batch steps max-new-tokens eval-records",
    "train_grpo": "prompts mu micro-batch steps max-new-tokens eval-records",
    "train_recover": "batch mu steps",
    "evaluate": "batch max-new-tokens",
    "rr1.annotate.__main__": "high workers max-tokens",
    "rr1.certify": "group-sizes new-tokens",
    "rr1.u1.__main__": "batch steps",
    "rr1.u1.report": "limit steps",
}


@pytest.mark.parametrize("script", AT_LEAST_ONE)
def test_what_must_be_one_at_least(script, capsys):
    for name in AT_LEAST_ONE[script].split():
        assert refused(script, f"--{name}", "0") and not refused(script, f"--{name}", "1")
        said = capsys.readouterr().err
        assert re.search(rf"--{name} 0: give (at least 1|1 to \d+)", said), said


@pytest.mark.parametrize(
    "script, flags, allowed",
    [
        ("train_grpo", "--group-size 1", "at least 2"),
        ("train_recover", "--group-size 1", "at least 2"),
        ("train_grpo", "--temperature 0", "at least 0.01"),
        ("train_grpo", "--max-grad-norm 0", "at least 1e-09"),
        ("evaluate", "--levels 0.25 1.5", "0 to 1"),
    ],
)
def test_other_limits(script, flags, allowed, capsys):
    assert refused(script, *flags.split())
    assert f"give {allowed}\n" in capsys.readouterr().err


def test_0_is_never_all_or_none_where_it_says_so():
    for flags in ("--save-every 0", "--eval-every 0", "--beta 0", "--warmup 0", "--seed 0"):
        assert not refused("train_grpo", *flags.split())


@pytest.mark.parametrize("script", ["train_sft", "train_grpo", "train_recover"])
def test_a_wrong_number_is_said_before_anything_is_loaded(
    script, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["--steps", "0"])
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out
