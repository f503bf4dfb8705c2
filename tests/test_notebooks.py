"""The notebooks: as they are committed (run from top to bottom without a complaint, small, in the
agreed form), and executed from a clean kernel, the solutions of their exercises too."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

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


class Kernel:
    """A clean kernel in the notebooks' folder, as Jupyter starts it."""

    def __init__(self):
        where = {"metadata": {"path": str(FOLDER)}}
        self.client = NotebookClient(
            nbformat.v4.new_notebook(), timeout=600, resources=where
        )

    def run(self, source: str) -> str:
        """What the code prints. CellExecutionError where it fails."""
        cells = self.client.nb.cells
        cells.append(nbformat.v4.new_code_cell(source))
        outputs = self.client.execute_cell(cells[-1], len(cells) - 1).outputs
        return "".join(o.get("text", "") for o in outputs)


def exercises(path: Path) -> Iterator[tuple[list[str], str, str]]:
    """Of each exercise: the names that wait for an answer, the cell that checks, the solution."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in found]
    for place, source in enumerate(sources):
        for text in source.split("<details><summary>Solution</summary>")[1:]:
            code = re.search(r"```python\n(.*?)```", text.split("</details>")[0], re.DOTALL)
            assert code, f"a solution without code: {text}"
            waiting = [
                n for n in ast.parse(sources[place - 2]).body if isinstance(n, ast.Assign)
            ]
            names = [
                n.id for part in waiting for n in ast.walk(part) if isinstance(n, ast.Name)
            ]
            yield names, sources[place - 1], code[1]


SPOIL = """
def spoiled(answer):
    if callable(answer):
        return lambda *given, **named: None
    if isinstance(answer, (str, list, tuple)):
        return answer[::-1]
    return not answer if isinstance(answer, bool) else 10 * answer + 1
"""


def accepted(kernel: Kernel, check: str) -> bool:
    """Whether the exercise's own check says `right` (chapter 12: `found`)."""
    try:
        said = kernel.run(check)
    except CellExecutionError:
        return False
    return bool(re.search(r"^(.*: )?(right|found)\b", said, re.MULTILINE))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_its_solutions_are_right(path):
    """All in one kernel: the notebook as a reader runs it, then each solution, which the
    exercise's check must accept, and the same answer spoiled, which it must not."""
    kernel = Kernel()
    with kernel.client.setup_kernel():
        for cell in cells(path, "code"):
            kernel.run("".join(cell["source"]))
        took = float(kernel.run("import time; print(time.process_time())"))
        assert took < 90, "seconds of one core"
        kernel.run(SPOIL)
        for names, check, solution in exercises(path):
            kernel.run(solution + "".join(f"\n{n} = spoiled({n})" for n in names))
            assert not accepted(kernel, check), f"anything is right for\n{check}"
            kernel.run(solution)
            assert accepted(kernel, check), f"not right:\n{solution}"
