"""Everything about one model as plain numbers; several models as Markdown, a column a model."""

from collections.abc import Sequence

from rr1.evaluation.figure_6 import figure_6
from rr1.evaluation.metrics import categories, damaged, judge, summary, table_1, table_2
from rr1.evaluation.statistics import cell, markdown

SUMMARY = "Damaged pictures, one line a model:"
TABLE_1 = """\
Table 1: damaged pictures by strength (a benchmark's own, or total intensity: low < 0.5, mid < 1,
high). Choice and open: share right; captions: F1 of phrases; "proxy" and "votes": see
rr1/evaluation/scores.py and votes.py. value [95 % interval] n. An unread answer counts as wrong.
Overall is the plain mean of the nine cells."""
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


def of_model(rows: Sequence[dict], seed: int = 0) -> dict:
    """Everything about one model, from the rows of its predictions.jsonl; plain numbers only."""
    judged = [judge(row) for row in rows]
    own = [row for row in judged if row["shown"] == "as is"]
    summed = summary(damaged(judged), seed)
    found = {
        "summary": {name: estimate._asdict() for name, estimate in summed.items()},
        "table_1": table_1(judged, seed) if own else {},
        "table_2": table_2(judged, seed=seed),
        "others": {form: table_2(judged, form, seed) for form in ("open", "direct")},
        "categories": categories(judged, seed),
    }
    is_plain = any(row["plain"] for row in rows)
    if not is_plain and any(row["degradations"] is not None for row in own):
        found["figure_6"] = figure_6(judged, seed)
    return found


# ---------------------------------------------------------------- as text


def as_text(reports: dict[str, dict]) -> str:
    """The tables of all models; what no model has is left out."""
    first = next(iter(reports))
    parts = {name: tables(report) for name, report in reports.items()}
    blocks = [SUMMARY, summary_table(reports)]
    for title in parts[first] | {FIGURE_6: {}, VERSUS: {}}:
        columns = {name: part[title] for name, part in parts.items() if title in part}
        rows = dict.fromkeys(row for column in columns.values() for row in column)
        if rows:
            lines = [[row, *(column.get(row, "-") for column in columns.values())] for row in rows]
            blocks += [title.format(first), markdown(["", *columns], lines)]
    return "\n\n".join(blocks)


def summary_table(reports: dict[str, dict]) -> str:
    found = [report["summary"] for report in reports.values()]
    measures = max(found, key=len)  # a plain model has fewer
    lines = [[short(estimates.get(measure)) for measure in measures] for estimates in found]
    return markdown(["", *measures], [[name, *line] for name, line in zip(reports, lines)])


def tables(report: dict) -> dict[str, dict[str, str]]:
    """title -> {row: cell} of one model."""
    found = {TABLE_1: cells(report["table_1"]), TABLE_2: cells(report["table_2"], percent=True)}
    for form, table in report["others"].items():
        found[f"The same for {form} questions."] = cells(table, percent=True)
    found[CATEGORIES] = cells(report["categories"])
    if "figure_6" in report:
        numbers = report["figure_6"] | report["summary"]
        names = ("type_f1", "intensity_error", "length", "clean_called_damaged")
        found[FIGURE_6] = cells({name.replace("_", " "): numbers[name] for name in names})
    if "versus" in report:
        found[VERSUS] = {label(row): change(e) for row, e in report["versus"].items()}
    return found


def cells(table: dict[str, dict], percent: bool = False) -> dict[str, str]:
    return {label(row) if percent else row: cell(estimate) for row, estimate in table.items()}


def label(row: str) -> str:
    """`0.25`, an intensity, as `25%`; a word as it is."""
    return f"{float(row):.0%}" if row[:1].isdigit() else row


def short(estimate: dict | None) -> str:
    return "-" if estimate is None or estimate["value"] is None else f"{estimate['value']:.3f}"


def change(e: dict) -> str:
    """`+0.012 [-0.040, +0.065] n 170, +11 -9, p 0.82`."""
    difference = f"{e['value']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}] n {e['n']}"
    return f"{difference}, +{e['gained']} -{e['lost']}, p {e['p']:.2g}"
