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
        "pip install -r requirements.txt && pytest -n auto",
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
        assert re.search(
            rf"^def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.M
        ), f"{path}::{function}"


PAPER = (ROOT / "docs" / "learn" / "paper.md").read_text(encoding="utf-8")
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
        assert (ROOT / path).exists(), (
            f"{path} is in docs/use/files.md and not in the repository"
        )
    found = {
        str(p.relative_to(ROOT))
        for pattern in ("*.py", "rr1/**/*.py", "bench/*.py", "docs/**/*.md")
        for p in ROOT.glob(pattern)
    }
    missing = {
        p
        for p in found
        if not p.endswith("__init__.py")
        and not any(p == q or p.startswith(q.rstrip("/") + "/") for q in listed)
    }
    assert not missing, f"not in docs/use/files.md: {sorted(missing)}"


def test_the_readme_is_short():
    assert len(README.encode()) <= 10_000


def links(text: str) -> list[str]:
    """Where links and pictures lead, without those to the web or to the page itself."""
    return re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)


PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]


def test_links_are_found_in_a_page():
    text = "[a](b.md) ![c](d/e.png) [f](g.md#h) [i](https://j.k) [l](#m) [n](mailto:o@p.q)"
    assert links(text) == ["b.md", "d/e.png", "g.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        prose = [cell["source"] for cell in cells if cell["cell_type"] == "markdown"]
        text = "\n".join("".join(source) for source in prose)
    for target in links(text):
        path = (page.parent / target).resolve()
        assert path.exists() and path.is_relative_to(ROOT), target


def test_paths_in_words_lead_somewhere():
    """docs/.. and notebooks/.. as named in pages, notebooks, source and tests."""
    source = [
        path
        for pattern in ("*.py", "rr1/**/*.py", "bench/*.py")
        for path in ROOT.glob(pattern)
    ]
    found = set()
    for page in [*PAGES, *source]:
        for path in re.findall(
            r"\b(?:docs|notebooks)/[\w/]+\.\w+", page.read_text(encoding="utf-8")
        ):
            assert (ROOT / path).exists(), f"{page.relative_to(ROOT)}: {path}"
            found.add(path)
    assert "docs/learn/metrics.md" in found
