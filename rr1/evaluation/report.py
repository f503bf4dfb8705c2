"""Everything about one model as plain numbers; several models as Markdown, a column a model."""

from collections.abc import Callable, Sequence

from rr1.evaluation.figure_6 import figure_6
from rr1.evaluation.metrics import (
    categories,
    damaged,
    judge_all,
    summary,
    table_1,
    table_2,
)
from rr1.evaluation.statistics import Estimate, cell, interval, markdown

SUMMARY = "Damaged pictures, one line a model:"
TABLE_1 = """\
Table 1: pictures by strength of the damage (a benchmark's own, or by total intensity: none,
light < 0.75, medium < 1.5, strong). Choice and open: share right; captions: F1 of phrases; "proxy"
and "votes": see rr1/evaluation/scores.py and votes.py. value [95 % interval] n. An unread answer
counts as wrong. Overall is the plain mean of the nine cells of damaged pictures."""
TABLE_2 = """\
Table 2: choice questions on the clean picture and on it damaged by one type at each intensity:
share right."""
CATEGORIES = "Choice questions by category, on the pictures as they came."
FIGURE_6 = """\
Figure 6: types, intensities and length of the chain on damaged pictures; clean pictures called
damaged."""
VERSUS = """\
Choice questions against {}, question by question: difference [95 % interval] n, answers turned
right and wrong, and how probable so uneven a split is if neither is better (McNemar's exact
test)."""


def of_model(rows: Sequence[dict]) -> dict:
    """Everything about one model, from the rows of its predictions.jsonl; plain numbers only."""
    judged = judge_all(rows)
    own = [row for row in judged if row["shown"] == "as is"]
    summed = summary(damaged(judged))
    asked = {row.get("asked", "") for row in rows} - {""}
    others = {form: table_2(judged, form) for form in ("open", "direct")}
    found = {
        "asked": " and ".join(sorted(asked)),
        "summary": {name: estimate._asdict() for name, estimate in summed.items()},
        "table_1": table_1(judged) if own else {},
        "table_2": table_2(judged),
        "others": others,
        "categories": categories(judged),
    }
    has_chains = not any(row["plain"] for row in rows)
    is_known = any(row["degradations"] is not None for row in own)
    if has_chains and is_known:
        found["figure_6"] = figure_6(judged)
    return found


# ---------------------------------------------------------------- as text


def as_text(reports: dict) -> str:
    """The tables of all models; what no model has is left out."""
    first = next(iter(reports))
    parts = {name: tables(report) for name, report in reports.items()}
    blocks = [SUMMARY, summary_table(reports)]
    asked = [
        f"{name} by {report['asked']}"
        for name, report in reports.items()
        if report["asked"]
    ]
    if asked:
        blocks.append(f"A benchmark's choices were asked: {', '.join(asked)}.")
    for title in [*parts[first], FIGURE_6, VERSUS]:
        columns = {name: part[title] for name, part in parts.items() if title in part}
        if title.format(first) not in blocks and any(columns.values()):
            blocks += [title.format(first), side_by_side(columns)]
    return "\n\n".join(blocks)


def side_by_side(columns: dict) -> str:
    """{column: {row: cell}} as a table; "-" where a column lacks a row."""
    rows = {}
    for column in columns.values():
        for row in column:
            rows[row] = [row]
    for row, line in rows.items():
        for column in columns.values():
            line.append(column.get(row, "-"))
    return markdown(["", *columns], list(rows.values()))


def summary_table(reports: dict) -> str:
    summaries = [report["summary"] for report in reports.values()]
    measures = max(summaries, key=len)  # a plain model has fewer
    lines = []
    for name, report in reports.items():
        values = [short(report["summary"].get(measure)) for measure in measures]
        lines.append([name, *values])
    return markdown(["", *measures], lines)


def tables(report: dict) -> dict:
    """title -> {row: cell} of one model."""
    found = {TABLE_1: cells(report["table_1"])}
    found[TABLE_2] = cells(report["table_2"], label)
    for form, table in report["others"].items():
        found[f"The same for {form} questions."] = cells(table, label)
    found[CATEGORIES] = cells(report["categories"])
    if "figure_6" in report:
        figure, summed = report["figure_6"], report["summary"]
        found[FIGURE_6] = cells(
            {
                "type F1": summed["type_f1"],
                **{f"type F1, {level}": e for level, e in figure["type_f1"].items()},
                "intensity error": summed["intensity_error"],
                "length": summed["length"],
                "clean called damaged": figure["clean_called_damaged"],
            }
        )
    if "versus" in report:
        found[VERSUS] = {label(row): change(e) for row, e in report["versus"].items()}
    return found


def cells(table: dict, name_of: Callable[[str], str] = str) -> dict:
    return {name_of(row): cell(estimate) for row, estimate in table.items()}


def label(row: str) -> str:
    """`0.25`, an intensity, as `25%`; a word as it is."""
    if row[:1].isdigit():
        return f"{float(row):.0%}"
    return row


def short(estimate: dict | None) -> str:
    if estimate is None or estimate["value"] is None:
        return "-"
    return f"{estimate['value']:.3f}"


def change(e: dict) -> str:
    """`+0.012 [-0.040, +0.065] n 170, +11 -9, p 0.82`."""
    difference = interval(Estimate(e["value"], e["low"], e["high"], e["n"])).strip("*")
    return f"{difference} n {e['n']}, +{e['gained']} -{e['lost']}, p {e['p']:.2g}"
