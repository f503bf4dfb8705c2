"""What the README promises about the repository is true: commands, paper map, file tree, links."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found, f"the README has no section {title!r}"
    return found[1]


FILES = (ROOT / "docs" / "use" / "files.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| \((\d+)\) \|(.*)\|$", section("Paper map"), re.M)


def test_the_two_commands_are_there_once():
    for command in (
        "pip install -r requirements.txt && torchrun train_grpo.py",
        "pip install -r requirements.txt && pytest",
    ):
        assert len(re.findall(rf"^{re.escape(command)}$", README, re.M)) == 1, command
    assert (ROOT / "requirements.txt").read_text().splitlines()[1].startswith("torch==")


def test_every_equation_is_in_the_paper_map():
    assert [int(number) for number, _ in ROWS] == list(range(1, 18))


@pytest.mark.parametrize("number, row", ROWS)
def test_what_an_equation_names_exists(number, row):
    _, code = (cell.strip() for cell in row.strip().split("|"))
    assert_functions_exist(code)


def assert_functions_exist(code: str) -> None:
    """Functions as `module.name`, at least one."""
    names = re.findall(r"`([\w.]+)`", code)
    assert names, f"no function: {code}"
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def assert_tests_exist(test: str) -> None:
    """Tests as `path::name`, at least one."""
    tests = re.findall(r"`(tests/\w+\.py)::(\w+)`", test)
    assert tests, f"no test: {test}"
    for path, function in tests:
        assert re.search(rf"^def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), (
            f"{path}::{function}"
        )


PAPER = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
PLACES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAPER.splitlines()
    if re.match(r"\| [^|]", line) and "`" in line
]


def test_the_paper_page_has_every_equation():
    said = " ".join(what for what, *_ in PLACES)
    assert {int(n) for n in re.findall(r"\((\d+)\)", said)} >= set(range(1, 18))


@pytest.mark.parametrize("place", PLACES, ids=[place[0][:30] for place in PLACES])
def test_what_the_paper_page_names_exists(place):
    _, code, test, notebook = place
    assert_functions_exist(code)
    assert_tests_exist(test)
    if notebook:
        chapter, _, heading = notebook.partition(": ")
        [path] = (ROOT / "notebooks").glob(f"{chapter}_*.ipynb")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        headings = [
            line[3:].strip()
            for cell in cells
            for line in "".join(cell["source"]).splitlines()
            if line.startswith("## ")
        ]
        assert heading in headings, f"{path.name} has no heading {heading!r}"


def test_the_file_tree_is_the_tree():
    listed = re.findall(r"^([\w./-]+)  ", re.search(r"```\n(.*?)```", FILES, re.S)[1], re.M)
    for path in listed:
        assert (ROOT / path).exists(), f"{path} is in docs/use/files.md and not in the repository"
    python = {
        str(p.relative_to(ROOT))
        for pattern in ("*.py", "rr1/**/*.py", "bench/*.py")
        for p in ROOT.glob(pattern)
    }
    missing = {
        p
        for p in python
        if not p.endswith("__init__.py")
        and not any(p == q or p.startswith(q.rstrip("/") + "/") for q in listed)
    }
    assert not missing, f"not in docs/use/files.md: {sorted(missing)}"


def test_the_readme_is_short():
    assert len(README.encode()) <= 10_000


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
