"""The exercises' judge: the library's functions pass; a wrong one is shown where it is wrong."""

import re

import numpy as np
import pytest
import torch

from rr1.check import EQUATIONS, check


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_right_function_is_right(name, capsys):
    assert check(name, EQUATIONS[name][1])
    assert capsys.readouterr().out == f"{name}: right on 200 random cases\n"


def std_of_a_sample(R):
    return (R - R.mean(1, keepdim=True)) / R.std(1, keepdim=True)


def not_shifted(logits, ids, mask):
    return torch.nn.functional.cross_entropy(logits[mask], ids[mask])


def numbers_in_brackets(text):
    return [float(s) for s in re.findall(r"\((.*?)\)", text)]


WRONG = {
    "Eq. 4": numbers_in_brackets,
    "Eq. 5": not_shifted,
    "Eq. 6": lambda named, true: float(len(named) - len(true)),
    "Eq. 7": lambda D: 40 + 40 * len(D),
    "Eq. 8": lambda length, right: 1 - abs(length - right) / max(1, length),
    "Eq. 10": std_of_a_sample,
    "saturation": lambda image, s, rng: (1 - s) * image + s * image.mean(-1, keepdims=True),
    "clip": lambda ratio, A, clip: ratio.clamp(1 - clip, 1 + clip) * A,
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_wrong_function_is_shown_where_it_is_wrong(name, capsys):
    assert not check(name, WRONG[name])
    said = capsys.readouterr().out
    assert (
        said.startswith(f"{name}: not yet. Given ") and "yours" in said and "right" in said
    )


def test_a_number_in_place_of_a_table_is_wrong():
    assert not check("Eq. 10", lambda R: torch.zeros(()))
    assert not check("clip", lambda ratio, A, clip: np.zeros(3))


def test_an_unknown_equation_is_refused():
    with pytest.raises(ValueError, match="unknown equation 'Eq. 99'; there are Eq. 4, "):
        check("Eq. 99", abs)
