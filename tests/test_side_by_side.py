"""docs/side_by_side.html is what `python docs/side_by_side.py` makes of the repository of today.

The generator stops by name at a function, test or heading that is not there."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
MADE = runpy.run_path(str(DOCS / "side_by_side.py"))


def test_the_page_is_current():
    committed = (DOCS / "side_by_side.html").read_text(encoding="utf-8")
    assert committed == MADE["page"](), "run: python docs/side_by_side.py"


def test_every_equation_is_there_once():
    found = re.findall(r'id="eq-(\d+)"', MADE["page"]())
    assert found == [str(number) for number in range(1, 18)]


def test_the_page_needs_nothing_from_outside():
    assert not re.search(r"<script|<link|<img|src=|@import|url\(", MADE["page"]())


def test_what_does_not_exist_is_named():
    with pytest.raises(SystemExit, match="test_nothing"):
        MADE["test"]("tests/test_rewards.py::test_nothing")
    with pytest.raises(SystemExit, match="No such heading"):
        MADE["notebook"]("05: No such heading")
    with pytest.raises(AttributeError, match="no_such_reward"):
        MADE["function"]("rr1.rewards.no_such_reward")


def test_an_index_and_an_exponent():
    assert MADE["math"]("s_d^2") == "<msubsup><mi>s</mi><mi>d</mi><mn>2</mn></msubsup>"


def test_every_formula_is_whole():
    formulas = re.findall(r"<math.*?</math>", MADE["page"]())
    assert len(formulas) > 17
    for formula in formulas:
        ElementTree.fromstring(formula.replace("&nbsp;", " "))
