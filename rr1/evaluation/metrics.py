"""What an evaluation reports, computed from the rows of predictions.jsonl and nothing else.

    one prediction   judge, count_types           (what is right: rr1.evaluation.scores)
    many             measures, summary, table_1, table_2, categories, versus
    how sure         rr1.evaluation.statistics

A row is a dict: form ("choice", "open", "caption", "direct"), choices, answer (the true one),
degradations (what is on the picture shown; None: not known), shown ("as is", "clean", or the level
as text), plain (asked without a chain), response, length, truth_length, truncated; of a benchmark
also `benchmarks.FIELDS`, and votes if a judge was asked.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from degrade import Degradation
from rr1.chain import is_well_formed, parse
from rr1.evaluation.scores import find_answer, score_answer, score_benchmark, score_votes
from rr1.evaluation.statistics import (
    bootstrap,
    bootstrap_cells,
    mcnemar,
    paired_difference,
    wilson,
)
from rr1.records import LEVELS, level
from rr1.rewards import match_types, r_deg, r_len

FORMS = ("choice", "open", "caption")
GRADES = ("low", "mid", "high")  # a benchmark's own
Rows = Sequence[dict]


# ---------------------------------------------------------------- one prediction


def count_types(predicted: list[Degradation], truth: list[Degradation]) -> dict:
    """How many types are "named", "true" and "matched" one to one, and the matches' summed |ds|."""
    matched, error = match_types(predicted, truth)
    return {"named": len(predicted), "true": len(truth), "matched": matched, "error": error}


def judge(row: dict) -> dict:
    """The row with what is to be said about it.

    score (in [0, 1], None if there is no true answer), parsed (whether the answer could be read),
    by ("proxy" or "votes", where it is not exact), true_types, total (of their intensities); of a
    chain also said (the types it names), r_deg (None where the damage is not known), r_len (None
    where there is no true chain), well_formed, and the counts of `count_types`.
    """
    known = row["degradations"] is not None
    truth = [Degradation(**d) for d in row["degradations"] or ()]
    total = sum(s for _, s in truth)
    judged = row | {"true_types": truth, "total": round(total, 6), "by": ""}
    if not row["plain"]:
        said = parse(row["response"]).degradations
        judged["said"] = said
        judged["r_deg"] = r_deg(said, truth) if known else None
        judged["r_len"] = None
        if row["truth_length"]:
            judged["r_len"] = r_len(row["length"], row["truth_length"])
        judged["well_formed"] = is_well_formed(row["response"])
        judged |= count_types(said if known else [], truth)
    judged["score"] = judged["parsed"] = None
    if row["answer"] is not None:
        judged["score"], judged["parsed"] = score(row)
        if "votes" in row:
            judged["by"] = "votes"
        elif "benchmark" in row and row["form"] in ("open", "caption"):
            judged["by"] = "proxy"
    return judged


def judge_all(rows: Rows) -> list[dict]:
    """Every row judged; of a circle (a choice asked again, its options turned) one is left.

    It is right only if all of them are, and read only if all of them are.
    """
    judged = [judge(row) for row in rows]
    circles = {}
    for i, row in enumerate(judged):
        name = (row["circle"], row["shown"]) if "circle" in row else i
        circles.setdefault(name, []).append(row)
    left = []
    for first, *others in circles.values():
        for row in others:
            if row["score"] is not None:
                first["score"] = min(first["score"], row["score"])
                first["parsed"] = first["parsed"] and row["parsed"]
        left.append(first)
    return left


def score(row: dict) -> tuple[float, bool]:
    """(score in [0, 1], whether the answer could be read)."""
    if "votes" in row:
        return score_votes(row["votes"], row["most"])
    if "benchmark" in row:
        return score_benchmark(find_answer(row["response"], row["form"]), row)
    answer = row["response"]
    if not row["plain"]:
        chain = parse(answer)
        answer = chain.answer
        if row["form"] == "caption":
            answer = chain.conclusion
    return score_answer(answer, row["form"], row["answer"], row["choices"])


# ---------------------------------------------------------------- many


def measures(judged: Rows) -> dict:
    """name -> (numerators, denominators), one for each record: every measure is sum / sum.

    What says nothing about a record has 0 in both. Rows of a plain model have no chain and so only
    the last three.
    """

    def column(name: str) -> np.ndarray:
        values = [row[name] or 0 for row in judged]
        return np.array(values, float)

    def is_known(name: str) -> np.ndarray:
        known = [row[name] is not None for row in judged]
        return np.array(known, float)

    everyone = np.ones(len(judged))
    is_choice = [row["form"] == "choice" for row in judged]
    choice = is_known("score") * is_choice
    has_chains = not any(row["plain"] for row in judged)
    found = {}
    if has_chains:
        found["r_deg"] = column("r_deg"), is_known("r_deg")
        found["r_len"] = column("r_len"), is_known("r_len")
        found["type_f1"] = 2 * column("matched"), column("named") + column("true")
        found["intensity_error"] = column("error"), column("matched")
        found["well_formed"] = column("well_formed"), everyone
    found["choice_accuracy"] = column("score") * choice, choice
    found["length"] = column("length"), everyone
    found["truncated"] = column("truncated"), everyone
    return found


SHARES = ("well_formed", "choice_accuracy", "truncated")


def summary(judged: Rows) -> dict:
    """Every measure of `measures` with its interval."""
    found = {}
    for name, (above, below) in measures(judged).items():
        if name in SHARES:
            n = int(below.sum())
            found[name] = wilson(above.sum(), n)
        else:
            found[name] = bootstrap(above, below)
    return found


def is_damaged(row: dict) -> bool:
    """A record's own picture that is damaged, whether by what is known or not."""
    if row["shown"] != "as is":
        return False
    return row["degradations"] is None or len(row["true_types"]) > 0


def strength(row: dict) -> str | None:
    """A benchmark's own strength, or the `level` of the total intensity; None if not known."""
    if "strength" in row:
        return row["strength"]
    if row["degradations"] is None:
        return None
    return level(row["total"])


def damaged(judged: Rows) -> list[dict]:
    """The records' own pictures that are damaged; where all are clean, what was damaged here."""
    own = list(filter(is_damaged, judged))
    if own:
        return own
    return [row for row in judged if row["shown"] != "as is" and row["true_types"]]


def share(rows: Rows) -> dict:
    """Mean score of judged rows, how many answers could not be read, and by what it was scored.

    The interval is Wilson's where all are right or wrong, the bootstrap's elsewhere.
    """
    scores = scores_of(rows)
    forms = {row["form"] for row in rows}
    if "caption" not in forms and set(scores) <= {0, 1}:
        estimate = wilson(sum(scores), len(scores))
    else:
        estimate = bootstrap(scores)
    unread = [row for row in rows if not row["parsed"]]
    return estimate._asdict() | {"unparsed": len(unread)} | scored_by(rows)


def scored_by(rows: Iterable[dict]) -> dict:
    ways = {row["by"] for row in rows if row["by"]}
    if not ways:
        return {}
    return {"by": " and ".join(sorted(ways))}


def means(cells: Iterable[Rows], rows: Rows) -> list[dict]:
    """The plain mean of the cells and the mean over all rows."""
    by = scored_by(rows)
    of_cells = bootstrap_cells([scores_of(cell) for cell in cells])
    of_rows = bootstrap(scores_of(rows))
    return [of_cells._asdict() | by, of_rows._asdict() | by]


def scores_of(rows: Rows) -> list[float]:
    return [row["score"] for row in rows]


def grouped(rows: Iterable[dict], names: Iterable[str]) -> dict:
    """name -> rows; `names` gives the name of each row."""
    groups = {}
    for row, name in zip(rows, names):
        groups.setdefault(name, []).append(row)
    return groups


def scored(judged: Iterable[dict], *forms: str) -> list[dict]:
    """The rows of these forms of question that have a score."""
    return [row for row in judged if row["score"] is not None and row["form"] in forms]


def cells_of(judged: Rows) -> list[str]:
    """The rows of Table 1: form of question by level, or by a benchmark's own grades."""
    levels = list(LEVELS)
    if any("strength" in row for row in judged):
        levels = GRADES
    return [f"{form} {level}" for form in FORMS for level in levels]


def table_1(judged: Rows) -> dict:
    """Table 1: the records' own pictures, three forms of question by strength of the damage.

    Choice and open: the share right; captions: mean F1; of R-Bench, votes or a proxy for them.
    "overall" is the plain mean of the nine cells of damaged pictures, "per question" the mean over
    questions about them.
    """
    own = [row for row in judged if row["shown"] == "as is"]
    rows = scored(own, *FORMS)
    names = [f"{row['form']} {strength(row)}" for row in rows]
    groups = grouped(rows, names)
    cells = {name: groups.get(name, []) for name in cells_of(judged)}
    table = {name: share(cell) for name, cell in cells.items()}
    damaged_cells = [cell for name, cell in cells.items() if not name.endswith("none")]
    hurt = list(filter(is_damaged, rows))
    overall, per_question = means(damaged_cells, hurt)
    table |= {"overall": overall, "per question": per_question}
    overall["cells"] = sum(map(bool, damaged_cells))
    return table


def table_2(judged: Rows, form: str = "choice") -> dict:
    """Table 2, the aim of Eq. (2): the same questions on the clean picture and at each level."""
    rows = scored(judged, form)
    cells = grouped(rows, [row["shown"] for row in rows])
    cells.pop("as is", None)
    return {name: share(cells[name]) for name in sorted(cells, key=place)}


def place(name: str) -> float:
    """Where a way of showing pictures stands in a table: as they came, clean, by level."""
    words = ["as is", *GRADES, *LEVELS, "clean"]
    if name in words:
        return words.index(name) - len(words)
    return float(name)


def categories(judged: Rows) -> dict:
    """Choice questions of a benchmark by category, on the pictures as they came."""
    rows = [row for row in scored(judged, "choice") if row["shown"] in ("as is", "clean")]
    rows = [row for row in rows if row.get("category")]
    names = [row["category"] for row in rows]
    cells = grouped(rows, names)
    if not cells:
        return {}
    table = {name: share(cells[name]) for name in sorted(cells)}
    mean, per_question = means(cells.values(), rows)
    return table | {"mean of categories": mean, "per question": per_question}


def versus(after: Rows, before: Rows) -> dict:
    """Two models on the same choice questions, rows of predictions.jsonl, for each way of showing.

    The difference with its paired interval, how many answers turned right (gained) and wrong
    (lost), and McNemar's exact p. Questions that only one of them was asked are left out.
    """
    then = {row["key"]: row for row in judge_all(before)}
    now = [row for row in judge_all(after) if row["key"] in then]
    now = scored(now, "choice")
    groups = grouped(now, map(way_of_showing, now))
    table = {}
    for name in sorted(groups, key=place):
        scores = np.array(scores_of(groups[name]))
        same_questions = [then[row["key"]] for row in groups[name]]
        scores_then = np.array(scores_of(same_questions))
        gained = int((scores > scores_then).sum())
        lost = int((scores < scores_then).sum())
        difference = paired_difference(scores, scores_then)
        table[name] = difference._asdict() | {
            "gained": gained,
            "lost": lost,
            "p": mcnemar(gained, lost),
        }
    return table


def way_of_showing(row: dict) -> str:
    """A level, clean, or the record's own picture, by its strength where that is known."""
    if row["shown"] == "as is":
        return strength(row) or "as is"
    return row["shown"]
