"""What the README promises about the repository is true: commands, paper map, file tree, links."""
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found, f"the README has no section {title!r}"
    return found[1]


ROWS = re.findall(r"^\| \((\d+)\) \|(.*)\|$", section("Paper map"), re.M)


def test_the_two_commands_are_there_once():
    for command in ("pip install -r requirements.txt && torchrun train_grpo.py", "pip install -r requirements.txt && pytest"):
        assert len(re.findall(rf"^{re.escape(command)}$", README, re.M)) == 1, command
    assert (ROOT / "requirements.txt").read_text().splitlines()[1].startswith("torch==")


def test_every_equation_is_in_the_paper_map():
    assert [int(number) for number, _ in ROWS] == list(range(1, 18))


@pytest.mark.parametrize("number, row", ROWS)
def test_what_an_equation_names_exists(number, row):
    _, code, test = (cell.strip() for cell in row.strip().split("|"))
    names, tests = re.findall(r"`([\w.]+)`", code), re.findall(r"`(tests/\w+\.py)::(\w+)`", test)
    assert names and tests, f"Eq. ({number}) names no function or no test"
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    for path, function in tests:
        assert re.search(rf"^def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), f"{path}::{function}"


def test_the_file_tree_is_the_tree():
    listed = re.findall(r"^([\w./-]+)  ", re.search(r"```\n(.*?)```", section("Files"), re.S)[1], re.M)
    for path in listed:
        assert (ROOT / path).exists(), f"{path} is in the README's tree and not in the repository"
    python = {str(p.relative_to(ROOT)) for pattern in ("*.py", "rr1/**/*.py", "bench/*.py") for p in ROOT.glob(pattern)}
    missing = {p for p in python if not p.endswith("__init__.py") and not any(p == q or p.startswith(q.rstrip("/") + "/") for q in listed)}
    assert not missing, f"not in the README's tree: {sorted(missing)}"


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
