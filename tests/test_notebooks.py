"""The notebooks as they are committed: run from top to bottom without a complaint, small, in the
agreed form. `.ci/run` executes them."""

import ast
import builtins
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[dict]:
    return [
        cell
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_was_run_whole_from_a_clean_kernel(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [
        o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"
    ], "an error, a warning or a progress bar"
    assert any(kind.startswith("image/") for o in outputs for kind in o.get("data", {})), (
        "no picture"
    )
    assert path.stat().st_size < 2_000_000
    for output in outputs:
        lines = "".join(output.get("text", [])).splitlines()
        assert len(lines) <= 40 and all(len(line) <= 170 for line in lines), (
            "output that overflows the page"
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_keeps_to_the_form(path):
    code, prose = (
        ["".join(cell["source"]) for cell in cells(path, kind)]
        for kind in ("code", "markdown")
    )
    number = int(path.name[:2])
    assert prose[0].startswith(f"# {number}. ")
    assert sum("assert" in source for source in code) >= 3
    assert len(re.findall(r"<details><summary>Solution</summary>", "".join(prose))) >= 2
    assert all(len(source.strip().splitlines()) <= 24 for source in code), (
        "a cell too long for a page"
    )
    promised = re.search(r"Eq\. (\d+)(?:-(\d+))?", prose[0].splitlines()[0])
    if promised:
        first, last = int(promised[1]), int(promised[2] or promised[1])
        assert {int(n) for n in re.findall(r"\\tag\{(\d+)\}", "".join(prose))} == set(
            range(first, last + 1)
        )


def names(source: str) -> tuple[set[str], set[str]]:
    """Names that a piece of code defines, and names that it reads."""
    found: tuple[set[str], set[str]] = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found[isinstance(node.ctx, ast.Load)].add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[0].add(node.name)
        elif isinstance(node, ast.alias):
            found[0].add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.arg):
            found[0].add(node.arg)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_solution_uses_what_the_notebook_has(path):
    """Each name that a solution reads is Python's, the notebook's or its own."""
    known = set(dir(builtins))
    for cell in cells(path, "code"):
        lines = "".join(cell["source"]).splitlines()
        known |= names("\n".join(line for line in lines if not line.startswith("%")))[0]
    prose = "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    solutions = re.findall(r"Solution</summary>\s*```python\n(.*?)```", prose, re.DOTALL)
    for solution in solutions:
        defined, read = names(solution)
        assert read <= known | defined, sorted(read - known - defined)
