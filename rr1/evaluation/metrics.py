"""What an evaluation reports, computed from the rows of predictions.jsonl and nothing else.

    one prediction   judge, count_types           (what is right: rr1.evaluation.scores)
    many             measures, level, table_1, table_2, categories, versus, figure_6, confusion, report
    as text          report_text  (how sure: rr1.evaluation.statistics)

A row is a dict: form ("choice", "open", "caption", "direct"), choices, answer (the true one), degradations (what is on the picture
shown; None: not known), shown ("as is", "clean", or the level as text), plain (asked without a chain), response, length,
truth_length, truncated; of a benchmark also `benchmarks.FIELDS`, and votes if a judge was asked.
"""
from __future__ import annotations

import math
from collections import Counter
from typing import Sequence

import numpy as np

from degrade import DEGRADATIONS, Degradation
from rr1.evaluation.scores import find_answer, score_answer, score_benchmark
from rr1.chain import is_well_formed, parse
from rr1.evaluation.statistics import Estimate, bootstrap, bootstrap_cells, mcnemar, paired_difference, wilson
from rr1.rewards import r_deg, r_len
from rr1.evaluation.statistics import cell, markdown

FORMS, LEVELS = ("choice", "open", "caption"), ("low", "mid", "high")
TYPES = (*DEGRADATIONS, "other")     # "other": a name that is not one of the sixteen
WIDTH = 0.25                         # of the bins of total intensity in Figure 6 (B)


# ---------------------------------------------------------------- one prediction

def count_types(predicted: list[Degradation], truth: list[Degradation]) -> dict[str, float]:
    """Of a one-to-one matching by type: how many are "named", "true", "matched", and the matches' summed |ds|, "error".

    The matching is that of `rewards.r_deg`, whose value is matched - error - (named - matched) - (true - matched).
    """
    sides = [Counter(tau for tau, s in side if 0 <= s <= 1) for side in (predicted, truth)]
    matched = (sides[0] & sides[1]).total()
    error = 3 * matched - len(predicted) - len(truth) - r_deg(predicted, truth)
    return {"named": len(predicted), "true": len(truth), "matched": matched, "error": max(0.0, error)}


def judge(row: dict) -> dict:
    """The row with what is to be said about it: score, parsed, by ("proxy" or "votes", where it is not exact); of a chain also said
    (the types it names), r_deg (None where the damage is not known), r_len (None where there is no true chain), well_formed, and
    the counts of `count_types`."""
    known = row["degradations"] is not None
    truth = [Degradation(**d) for d in row["degradations"] or ()]
    answer = response = row["response"]
    facts = {"true_types": truth, "total": round(sum(s for _, s in truth), 6), "by": ""}
    if not row["plain"]:
        chain = parse(response)
        answer = chain.conclusion if row["form"] == "caption" else chain.answer
        facts |= {"said": chain.degradations, "r_deg": r_deg(chain.degradations, truth) if known else None,
                  "r_len": r_len(row["length"], row["truth_length"]) if row["truth_length"] else None,
                  "well_formed": is_well_formed(response), **count_types(chain.degradations if known else [], truth)}
    if row["answer"] is None:                                 # nothing to compare with
        return row | facts | {"score": None, "parsed": None}
    if "votes" in row:                                        # of (votes, the most that a vote can be)
        given = [vote for vote in row["votes"] if vote is not None]
        facts["by"], parsed = "votes", len(given) == len(row["votes"]) > 0
        score = sum(given) / (row["most"] * max(1, len(row["votes"])))
    elif "benchmark" in row:
        facts["by"] = "proxy" if row["form"] in ("open", "caption") else ""
        score, parsed = score_benchmark(find_answer(response, row["form"]), row)
    else:
        score, parsed = score_answer(answer, row["form"], row["answer"], row["choices"])
    return row | facts | {"score": score, "parsed": parsed}


# ---------------------------------------------------------------- many

def level(total: float) -> str:
    """Table 1's strength of a damaged picture by its total intensity: low below 0.5, mid below 1, high above."""
    return LEVELS[(total >= 0.5) + (total >= 1.0)]


def measures(judged: Sequence[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (numerators, denominators), one for each record: every measure is sum / sum, so that two models can be compared
    record by record (`paired_difference`). What says nothing about a record has 0 in both. Rows of a plain model have no chain
    and so only the last three."""
    choice = np.array([r["form"] == "choice" and r["score"] is not None for r in judged], float)
    score, one = np.array([r["score"] or 0.0 for r in judged]), np.ones(len(judged))
    column = lambda name: np.array([float(r[name] or 0) for r in judged])
    chain = {}
    if not any(r["plain"] for r in judged):
        told = np.array([r["r_len"] is not None for r in judged], float)
        known = np.array([r["r_deg"] is not None for r in judged], float)
        chain = {"r_deg": (column("r_deg"), known), "r_len": (column("r_len"), told),
                 "type_f1": (2 * column("matched"), column("named") + column("true")),
                 "intensity_error": (column("error"), column("matched")), "well_formed": (column("well_formed"), one)}
    return chain | {"choice_accuracy": (score * choice, choice), "length": (column("length"), one),
                    "truncated": (column("truncated"), one)}


SHARES = ("well_formed", "choice_accuracy", "truncated")


def summary(judged: Sequence[dict], seed: int = 0) -> dict[str, Estimate]:
    """Every measure of `measures` with its interval."""
    return {name: wilson(above.sum(), int(below.sum())) if name in SHARES else bootstrap(above, below, seed)
            for name, (above, below) in measures(judged).items()}


def is_damaged(r: dict) -> bool:
    """A record's own picture that is damaged, whether by what is known or not."""
    return r["shown"] == "as is" and bool(r["true_types"] or r["degradations"] is None)


def strength(r: dict) -> str | None:
    """low, mid, high: a benchmark's own, or by the total intensity; None where neither is known."""
    return r.get("strength") or (level(r["total"]) if r["true_types"] else None)


def damaged(judged: Sequence[dict]) -> list[dict]:
    """The records' own pictures, less those that are clean; where all are clean, what was damaged here."""
    return [r for r in judged if is_damaged(r)] or [r for r in judged if r["shown"] != "as is" and r["true_types"]]


def share(rows: Sequence[dict], seed: int = 0) -> dict:
    """Mean score of judged rows as a dict: Wilson's interval where all are right or wrong, the bootstrap's elsewhere; how many
    answers could not be read; by what it was scored, if not exactly."""
    scores = [r["score"] for r in rows]
    whole = all(score in (0, 1) for score in scores) and not any(r["form"] == "caption" for r in rows)
    estimate = wilson(sum(scores), len(scores)) if whole else bootstrap(scores, seed=seed)
    by = " and ".join(sorted({r["by"] for r in rows} - {""}))
    return estimate._asdict() | {"unparsed": sum(not r["parsed"] for r in rows)} | ({"by": by} if by else {})


def means(cells: Sequence[Sequence[dict]], rows: Sequence[dict], seed: int = 0) -> tuple[dict, dict]:
    """The plain mean of the cells and the mean over all rows."""
    scores = [[r["score"] for r in cell] for cell in cells]
    by = {"by": share(rows)["by"]} if any(r["by"] for r in rows) else {}
    return bootstrap_cells(scores, seed)._asdict() | by, bootstrap([r["score"] for r in rows], seed=seed)._asdict() | by


def table_1(judged: Sequence[dict], seed: int = 0) -> dict:
    """Table 1's form: damaged pictures, three forms of question by three levels of strength, which is a benchmark's own or comes
    from the total intensity. Choice and open: the share right; captions: mean F1; of R-Bench, votes or a proxy for them.
    "overall" is the plain mean of the cells, "per question" the mean over questions."""
    rows = [r for r in judged if is_damaged(r) and r["score"] is not None]
    cells = {f"{form} {grade}": [r for r in rows if r["form"] == form and strength(r) == grade] for form in FORMS for grade in LEVELS}
    table = {name: share(cell, seed) for name, cell in cells.items()}
    table["overall"], table["per question"] = means(list(cells.values()), rows, seed)
    table["overall"]["cells"] = sum(map(bool, cells.values()))
    return table


def table_2(judged: Sequence[dict], form: str = "choice", seed: int = 0) -> dict:
    """Table 2's form, the aim of Eq. (2): the same questions on the clean picture and on it damaged at each level."""
    shown = sorted({r["shown"] for r in judged} - {"as is", "clean"}, key=float)
    cells = {name: [r for r in judged if r["shown"] == name and r["form"] == form and r["score"] is not None] for name in ["clean", *shown]}
    return {name: share(cell, seed) for name, cell in cells.items() if cell}


def categories(judged: Sequence[dict], seed: int = 0) -> dict:
    """Choice questions of a benchmark by its categories (of R-Bench, by distortion), on the pictures as they came."""
    rows = [r for r in judged if r["shown"] in ("as is", "clean") and r["form"] == "choice" and r.get("category") and r["score"] is not None]
    cells = {name: [r for r in rows if r["category"] == name] for name in sorted({r["category"] for r in rows})}
    if not cells:
        return {}
    mean, item = means(list(cells.values()), rows, seed)
    return {name: share(cell, seed) for name, cell in cells.items()} | {"mean of categories": mean, "per question": item}


def versus(after: Sequence[dict], before: Sequence[dict], seed: int = 0) -> dict:
    """Two models on the same choice questions, for each way they were shown: the difference with its paired interval, how many
    answers turned right (gained) and wrong (lost), and McNemar's exact p. Rows of predictions.jsonl in, those of both are compared."""
    judged = [{r["key"]: judge(r) for r in rows if r["form"] == "choice"} for rows in (after, before)]
    pairs = [(row, judged[1][key]) for key, row in judged[0].items() if key in judged[1] and row["score"] is not None]
    place = lambda r: r["shown"] if r["shown"] != "as is" else strength(r) or "as is"
    out, order = {}, ["as is", *LEVELS, "clean"]
    for name in sorted({place(a) for a, _ in pairs}, key=lambda name: (order.index(name), 0) if name in order else (9, float(name))):
        scores = np.array([(a["score"], b["score"]) for a, b in pairs if place(a) == name])
        gained, lost = (int((scores[:, i] > scores[:, 1 - i]).sum()) for i in (0, 1))
        difference = paired_difference((scores[:, 0], None), (scores[:, 1], None), seed)
        out[name] = difference._asdict() | {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}
    return out


def confusion(pairs: Sequence[tuple[list[Degradation], list[Degradation]]]) -> np.ndarray:
    """(predicted, true) lists of degradations -> counts (18, 18): which type is taken for which.

    Rows: the TYPES as they are, then "invented"; columns: the TYPES as named, then "missed". Types that are both true and named
    stand on the diagonal. What is left over on both sides was mistaken for each other; where it cannot be said which for which
    (two against one, two against two) each pair gets an equal part. So a row sums to how often its type is true, a column to
    how often it is named. Intensities play no part.
    """
    counts = np.zeros((len(TYPES) + 1, len(TYPES) + 1))
    places = {name: i for i, name in enumerate(TYPES)}
    for predicted, truth in pairs:
        named, true = (Counter(places.get(d.type, places["other"]) for d in side) for side in (predicted, truth))
        for i, k in (named & true).items():
            counts[i, i] += k
        left, wrong = list((true - named).elements()), list((named - true).elements())
        mistaken = min(len(left), len(wrong))
        for i in left:
            for j in wrong:
                counts[i, j] += mistaken / (len(left) * len(wrong))
            counts[i, -1] += 1 - mistaken / len(left)
        for j in wrong:
            counts[-1, j] += 1 - mistaken / len(wrong)
    return counts


def figure_6(judged: Sequence[dict], seed: int = 0) -> dict:
    """Figure 6 of a chain model: (A) types and intensities on damaged pictures, (B) chain length against total intensity.

    "intensity" and "length" are curves: a list of bins with their n. The curve of intensities is over types that are true once
    and named once. "clean_called_damaged": the share of the data's clean pictures of which any damage is claimed.
    """
    own = [r for r in judged if r["shown"] == "as is"]
    hurt, clean = damaged(own), [r for r in own if not r["true_types"]]
    once = lambda type, side: sum(tau == type for tau, _ in side) == 1
    matches = [(s, s_true) for r in hurt for tau, s_true in r["true_types"] for named, s in r["said"]
               if named == tau and once(tau, r["said"]) and once(tau, r["true_types"])]
    intensity, length = [], []
    for k in range(5):                                                                 # fifths of [0, 1]
        inside = [(s, s_true) for s, s_true in matches if min(4, int(5 * s_true)) == k]
        if inside:
            said, true = zip(*inside)
            intensity.append({"true": float(np.mean(true)), **bootstrap(said, seed=seed)._asdict()})
    told = [(r["total"], r["truth_length"], r["length"]) for r in own if r["truth_length"]]
    for k in sorted({math.ceil(total / WIDTH) for total, *_ in told}):                 # bin 0: clean; bin k: (k - 1, k] widths
        total, true, written = zip(*(row for row in told if math.ceil(row[0] / WIDTH) == k))
        length.append({"total": float(np.mean(total)), "truth": float(np.mean(true)), **bootstrap(written, seed=seed)._asdict()})
    pairs = [(r["said"], r["true_types"]) for r in hurt]
    return {"confusion": confusion(pairs).tolist(), "intensity": intensity, "length": length,
            "clean_called_damaged": wilson(sum(bool(r["said"]) for r in clean), len(clean))._asdict()}


def report(rows: Sequence[dict], seed: int = 0) -> dict:
    """Everything about one model, from the rows of its predictions.jsonl; numbers, lists and dicts only."""
    judged = [judge(row) for row in rows]
    own = [r for r in judged if r["shown"] == "as is"]
    out = {"summary": {name: e._asdict() for name, e in summary(damaged(judged), seed).items()},
           "table_1": table_1(judged, seed) if own else {}, "table_2": table_2(judged, seed=seed)}
    if others := {form: table for form in ("open", "direct") if (table := table_2(judged, form, seed))}:
        out["others"] = others
    if cells := categories(judged, seed):
        out["categories"] = cells
    if not any(row["plain"] for row in rows) and any(r["degradations"] is not None for r in own):
        out["figure_6"] = figure_6(judged, seed)
    return out


# ---------------------------------------------------------------- as text

def report_text(reports: dict[str, dict]) -> str:
    """The tables of all models, as Markdown."""
    chains = {name: r for name, r in reports.items() if "figure_6" in r}
    columns = ("r_deg", "r_len", "type_f1", "intensity_error", "well_formed", "choice_accuracy", "length", "truncated")
    short = lambda e: "-" if e is None or e["value"] is None else f"{e['value']:.3f}"
    name_of = lambda key: f"{float(key):.0%}" if key[:1].isdigit() else key
    blocks = ["Damaged pictures, one line a model:",
              markdown(["", *columns], [[name, *(short(r["summary"].get(c)) for c in columns)] for name, r in reports.items()])]

    def table(title: str, of: list[dict], text=cell, names: Sequence[str] = tuple(reports)) -> None:
        if keys := list(dict.fromkeys(key for part in of for key in part)):
            blocks.extend([title, markdown(["", *names], [[name_of(key), *(text(part.get(key)) for part in of)] for key in keys])])

    table("Table 1: damaged pictures by strength (a benchmark's own, or total intensity: low < 0.5, mid < 1, high). Choice and open: share\n"
          "right; captions: F1 of phrases; \"proxy\" and \"votes\": see rr1/evaluation/scores.py and rr1/evaluation/votes.py. value [95 % interval] n. An unread\n"
          "answer counts as wrong. Overall is the plain mean of the nine cells.", [r["table_1"] for r in reports.values()])
    table("Table 2: choice questions on the clean picture and on it damaged by one type at each intensity: share right.",
          [r["table_2"] for r in reports.values()])
    for form in ("open", "direct"):
        table(f"The same for {form} questions.", [r.get("others", {}).get(form, {}) for r in reports.values()])
    table("Choice questions by category, on the pictures as they came.", [r.get("categories", {}) for r in reports.values()])
    if chains:
        numbers = [r["figure_6"] | r["summary"] for r in chains.values()]
        parts = [{key.replace("_", " "): n[key] for key in ("type_f1", "intensity_error", "length", "clean_called_damaged")} for n in numbers]
        table("Figure 6: types, intensities and length of the chain on damaged pictures; clean pictures called damaged.", parts, names=tuple(chains))
    against = {name: r["versus"] for name, r in reports.items() if "versus" in r}
    change = lambda e: "-" if e is None else (f"{e['value']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}] n {e['n']}, "
                                              f"+{e['gained']} -{e['lost']}, p {e['p']:.2g}")
    table(f"Choice questions against {next(iter(reports))}, question by question: difference [95 % interval] n, answers turned right and wrong,\n"
          "and how probable so uneven a split is if neither is better (McNemar's exact test).", list(against.values()), change, tuple(against))
    return "\n\n".join(blocks)
