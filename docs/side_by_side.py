"""Writes docs/side_by_side.html, the paper's equations left and the code right. One command:

    python docs/side_by_side.py

The equations in words are in equations.txt. The tables of paper.md say what belongs to each.
"""

import ast
import inspect
import json
import keyword
import os
import pkgutil
import re
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

ROW = re.compile(r"^\| (Eq\. \(.*?) \| (.*?) \| (.*?) \| (.*?) \|$", re.MULTILINE)
PYTHON = re.compile(
    r"(?P<c>#.*)"
    r"|(?P<s>(?<!\w)[rfb]{0,2}(?:\"\"\"[\s\S]*?\"\"\"|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'))"
    rf"|(?P<k>\b(?:{'|'.join(keyword.kwlist)})\b)"
    r"|(?P<n>\b\d[\w.]*)"
)


def rows() -> list[tuple[str, ...]]:
    """(title, functions, test, heading) of each row of paper.md that is about equations."""
    return ROW.findall(next(DOCS.rglob("paper.md")).read_text(encoding="utf-8"))


def numbers(title: str) -> list[str]:
    """["10", "11"] of "Eq. (10) and (11), the advantage"."""
    return re.findall(r"\((\d+)\)", title)


def piece(text: str) -> str:
    """MathML of letters, numbers and signs without index: names, numbers and operators."""
    found = []
    for bold, word in re.findall(r"(\*(?=\w))?([\w-]+|\W)", text):
        tag = "mi" if word[0].isalpha() else "mn" if word[0].isdigit() else "mo"
        style = ' class="b" mathvariant="normal"' if bold else ""
        found.append(f"<{tag}{style}>{escape(word)}</{tag}>")
    return found[0] if len(found) == 1 else f"<mrow>{''.join(found)}</mrow>"


def term(word: str) -> str:
    """MathML of one word such as τ_d^(i)."""
    if word.startswith("<"):
        return word
    pattern = r"(?P<base>.+?)(?:_(?P<sub>.+?))?(?:\^(?P<sup>.+))?"
    given = re.fullmatch(pattern, word).groupdict()
    parts = [piece(text) for text in given.values() if text]
    if len(parts) == 1:
        return parts[0]
    tag = "m" + "".join(name for name in ("sub", "sup") if given[name])
    tag = "munderover" if word[0] == "∑" else tag
    return f"<{tag}>{''.join(parts)}</{tag}>"


def math(text: str) -> str:
    return "".join(map(term, text.split()))


def equations() -> dict[str, str]:
    """The left side of each equation, by number."""
    text = (DOCS / "equations.txt").read_text(encoding="utf-8")
    parts = re.split(r"^# (\d+)\n", text, flags=re.MULTILINE)[1:]
    return {number: left(number, body) for number, body in zip(parts[::2], parts[1::2])}


def left(number: str, body: str) -> str:
    lines = body.strip().splitlines()
    table = "".join(
        f"<mtr><mtd>{math(line[2:])}</mtd></mtr>" for line in lines if line[:2] == "= "
    )
    symbols = [line[2:].split(" : ") for line in lines if line[:2] == "- "]
    listed = "".join(
        f"<dt><math>{math(symbol)}</math></dt><dd>{escape(meaning)}</dd>\n"
        for symbol, meaning in symbols
    )
    words = " ".join(line for line in lines if line[:2] not in ("= ", "- "))
    return (
        f'<div class="eq" id="eq-{number}"><div><math display="block"><mtable>{table}'
        f"</mtable></math></div>({number})</div>\n<p>{escape(words)}</p>\n<dl>\n{listed}</dl>\n"
    )


def code(source: str) -> str:
    """A box with coloured Python."""
    coloured, end = "", 0
    for match in PYTHON.finditer(source):
        coloured += escape(source[end : match.start()])
        coloured += f'<span class="{match.lastgroup}">{escape(match[0])}</span>'
        end = match.end()
    return f'<pre tabindex="0">{coloured}{escape(source[end:])}</pre>\n'


def link(path: Path, text: str) -> str:
    return f'<a href="{Path(os.path.relpath(path, DOCS)).as_posix()}">{escape(text)}</a>'


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n{content}</details>\n"


def function(name: str) -> str:
    found = inspect.unwrap(pkgutil.resolve_name(name))
    path = Path(inspect.getsourcefile(found))
    file = link(path, path.relative_to(ROOT).as_posix())
    return (
        f"<h3><code>{name}</code> in {file}</h3>\n{code(inspect.getsource(found).strip())}"
    )


def test(place: str) -> str:
    file, name = place.split("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    found = [node for node in ast.parse(text).body if getattr(node, "name", "") == name]
    if not found:
        raise SystemExit(f"{file} has no test {name}; paper.md names it")
    first = min(node.lineno for node in (found[0], *found[0].decorator_list))
    source = "\n".join(text.splitlines()[first - 1 : found[0].end_lineno])
    return folded(f"Test <code>{name}</code> in {link(ROOT / file, file)}", code(source))


def notebook(place: str) -> str:
    """The code under a heading, such as "05: The length reward", up to the next heading."""
    chapter, heading = place.split(": ", 1)
    for path in sorted((ROOT / "notebooks").glob(f"{chapter}_*.ipynb")):
        inside, sources = False, []
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code" and inside:
                sources.append(text)
            elif cell["cell_type"] == "markdown" and text.startswith("#"):
                inside = text.splitlines()[0].strip("# ") == heading
        if sources:
            title = f"Notebook {link(path, path.name)}: {escape(heading)}"
            return folded(title, "".join(map(code, sources)))
    raise SystemExit(f"no notebook {chapter} has code under {heading!r}; paper.md names it")


def section(row: tuple[str, ...], known: dict[str, str]) -> str:
    title, functions, tests, place = row
    head, _, note = title.removeprefix("Eq. ").partition(". ")
    note = note and f"<p><b>In the code:</b> {escape(note)}.</p>\n"
    paper = "".join(known[number] for number in numbers(title))
    right = "".join(map(function, re.findall(r"`(.+?)`", functions)))
    right += "".join(map(test, re.findall(r"`(.+?)`", tests))) + notebook(place)
    return (
        f"<section><h2>Eq. {escape(head)}</h2>\n<div>{paper}{note}</div>\n"
        f"<div>{right}</div></section>\n"
    )


def page() -> str:
    known = equations()
    style = (DOCS / "side_by_side.css").read_text(encoding="utf-8")
    contents = "".join(f'<a href="#eq-{number}">{number}</a>' for number in known)
    sections = "".join(section(row, known) for row in rows())
    paper = link(next(DOCS.rglob("paper.md")), "The paper, section by section")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Robust-R1, side by side</title>\n<style>\n{style}</style></head><body>\n"
        "<h1>Paper left, code right</h1>\n<p>Each equation is as the paper prints it. "
        "Beside it is the code that computes it, the test that holds it, and the cells of "
        f"the notebook that show it. {paper} lists where the code differs.</p>\n"
        f"<nav>Equations {contents}</nav>\n{sections}</body></html>\n"
    )


def main() -> None:
    part = DOCS / "side_by_side.html.part"
    part.write_text(page(), encoding="utf-8")
    part.replace(DOCS / "side_by_side.html")


if __name__ == "__main__":
    main()
