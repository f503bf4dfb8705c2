"""What an evaluation reports, computed from the rows of predictions.jsonl and nothing else.

    one prediction   score_answer, caption_f1, count_types, judge
    many             measures, level, table_1, table_2, figure_6, confusion, report
    how sure         wilson (shares), bootstrap (means and ratios), bootstrap_cells, paired_difference

A row is a dict: form ("choice", "open", "caption"), choices, answer (the true one), degradations (what is on the picture shown),
shown ("as is", "clean", or the level as text), plain (asked without a chain), response, length, truth_length, truncated.
"""
from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple, Sequence

import numpy as np

from degrade import DEGRADATIONS, Degradation
from rr1.chain import is_well_formed, parse
from rr1.rewards import plain as plain_text
from rr1.rewards import choice_index, r_deg, r_len

FORMS, LEVELS = ("choice", "open", "caption"), ("low", "mid", "high")
TYPES = (*DEGRADATIONS, "other")     # "other": a name that is not one of the sixteen
Z = 1.959964                         # 95 % of a normal distribution lies within this many deviations
DRAWS = 2000                         # bootstrap resamples
WIDTH = 0.25                         # of the bins of total intensity in Figure 6 (B)


# ---------------------------------------------------------------- how sure

class Estimate(NamedTuple):
    """A value with its 95 % interval over n observations; all None where n = 0."""
    value: float | None
    low: float | None
    high: float | None
    n: int


def wilson(right: float, n: int) -> Estimate:
    """A share right / n with Wilson's score interval, which stays inside [0, 1] and is not empty at 0 or 1."""
    if n == 0:
        return Estimate(None, None, None, 0)
    p, shrink = right / n, 1 + Z * Z / n
    centre = (p + Z * Z / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def bootstrap(numerators: Sequence[float], denominators: Sequence[float] | None = None, seed: int = 0) -> Estimate:
    """sum(numerators) / sum(denominators) over records, which are resampled; without denominators it is the mean.
    n counts the records whose denominator is not 0. Percentile interval."""
    above, below = _pair(numerators, denominators)
    n = int((below != 0).sum())
    if n == 0:
        return Estimate(None, None, None, 0)
    return Estimate(float(above.sum() / below.sum()), *_interval(_resampled(above, below, _picks(len(above), seed))), n)


def bootstrap_cells(cells: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """The plain mean of the cells' means, each cell resampled within itself; empty cells are left out. n: observations."""
    cells = [np.asarray(cell, float) for cell in cells if len(cell)]
    if not cells:
        return Estimate(None, None, None, 0)
    draws = [_resampled(cell, np.ones_like(cell), _picks(len(cell), seed + i)) for i, cell in enumerate(cells)]
    return Estimate(float(np.mean([cell.mean() for cell in cells])), *_interval(np.mean(draws, 0)), sum(map(len, cells)))


def paired_difference(after: tuple, before: tuple, seed: int = 0) -> Estimate:
    """How much `after` is above `before`: both are (numerators, denominators or None) over the same records in the same
    order. Both are resampled together, so what makes a record hard for both falls out."""
    (above, below), (above_0, below_0) = _pair(*after), _pair(*before)
    if len(above) != len(above_0):
        raise ValueError(f"{len(above)} records after and {len(above_0)} before: a paired difference needs the same records")
    if not below.any() or not below_0.any():
        return Estimate(None, None, None, 0)
    picks = _picks(len(above), seed)
    value = above.sum() / below.sum() - above_0.sum() / below_0.sum()
    return Estimate(float(value), *_interval(_resampled(above, below, picks) - _resampled(above_0, below_0, picks)), len(above))


def _pair(numerators, denominators=None) -> tuple[np.ndarray, np.ndarray]:
    above = np.asarray(numerators, float)
    return above, np.ones_like(above) if denominators is None else np.asarray(denominators, float)


def _picks(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(n, size=(DRAWS, n))


def _resampled(above: np.ndarray, below: np.ndarray, picks: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):                       # a resample in which nothing counts is no number
        return above[picks].sum(1) / below[picks].sum(1)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------- one prediction

def caption_phrases(text: str) -> Counter:
    """Comma-separated phrases, the ground as one of its own: `a red star top left, a blue ring top right on sand` has three."""
    things, on, ground = text.rpartition(" on ")
    phrases = [*things.split(","), f"on {ground}"] if on else text.split(",")
    return Counter(phrase for phrase in map(plain_text, phrases) if phrase)


def caption_f1(caption: str, truth: str) -> float:
    """F1 over phrases, each counted once for each time that it stands there."""
    said, true = caption_phrases(caption), caption_phrases(truth)
    return 2 * (said & true).total() / max(1, said.total() + true.total())


def score_answer(answer: str | None, form: str, truth: str, choices: Sequence[str] | None) -> tuple[float, bool]:
    """(score in [0, 1], whether there was something to score). An answer that names no choice is wrong and unparsed, never
    guessed at; a choice may be named by index, letter or text."""
    if not answer or not answer.strip():
        return 0.0, False
    if form == "caption":
        return caption_f1(answer, truth), True
    right = choice_index(truth, choices) if choices else None
    if right is not None:
        picked = choice_index(answer, choices)
        return float(picked == right), picked is not None
    return float(plain_text(answer) == plain_text(truth)), True


def count_types(predicted: list[Degradation], truth: list[Degradation]) -> dict[str, float]:
    """Of a one-to-one matching by type: how many are "named", "true", "matched", and the matches' summed |ds|, "error".

    The matching is that of `rewards.r_deg`, whose value is matched - error - (named - matched) - (true - matched).
    """
    sides = [Counter(tau for tau, s in side if 0 <= s <= 1) for side in (predicted, truth)]
    matched = (sides[0] & sides[1]).total()
    error = 3 * matched - len(predicted) - len(truth) - r_deg(predicted, truth)
    return {"named": len(predicted), "true": len(truth), "matched": matched, "error": max(0.0, error)}


def judge(row: dict) -> dict:
    """The row with what is to be said about it: score, parsed; of a chain also said (the types it names), r_deg, r_len
    (None where there is no true chain), well_formed, and the counts of `count_types`."""
    truth = [Degradation(**d) for d in row["degradations"]]
    answer = response = row["response"]
    facts = {"true_types": truth, "total": round(sum(s for _, s in truth), 6)}
    if not row["plain"]:
        chain = parse(response)
        answer = chain.conclusion if row["form"] == "caption" else chain.answer
        facts |= {"said": chain.degradations, "r_deg": r_deg(chain.degradations, truth), "well_formed": is_well_formed(response),
                  "r_len": r_len(row["length"], row["truth_length"]) if row["truth_length"] else None,
                  **count_types(chain.degradations, truth)}
    if row["answer"] is None:                                 # nothing to compare with
        return row | facts | {"score": None, "parsed": None}
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
        chain = {"r_deg": (column("r_deg"), one), "r_len": (column("r_len"), told),
                 "type_f1": (2 * column("matched"), column("named") + column("true")),
                 "intensity_error": (column("error"), column("matched")), "well_formed": (column("well_formed"), one)}
    return chain | {"choice_accuracy": (score * choice, choice), "length": (column("length"), one),
                    "truncated": (column("truncated"), one)}


SHARES = ("well_formed", "choice_accuracy", "truncated")


def summary(judged: Sequence[dict], seed: int = 0) -> dict[str, Estimate]:
    """Every measure of `measures` with its interval."""
    return {name: wilson(above.sum(), int(below.sum())) if name in SHARES else bootstrap(above, below, seed)
            for name, (above, below) in measures(judged).items()}


def damaged(judged: Sequence[dict]) -> list[dict]:
    """The records' own pictures, less those that are clean."""
    return [r for r in judged if r["shown"] == "as is" and r["true_types"]]


def table_1(judged: Sequence[dict], seed: int = 0) -> dict:
    """Table 1's form: damaged pictures, three forms of question by three levels of total intensity. Choice and open: the share
    right; captions: mean F1. "overall" is the plain mean of the cells, "per question" the mean over questions."""
    rows = [r for r in damaged(judged) if r["score"] is not None]
    cells = {f"{form} {strength}": [r for r in rows if r["form"] == form and level(r["total"]) == strength]
             for form in FORMS for strength in LEVELS}
    scores = {name: [r["score"] for r in cell] for name, cell in cells.items()}
    table = {name: (bootstrap(values, seed=seed) if name.startswith("caption") else wilson(sum(values), len(values)))._asdict()
             | {"unparsed": sum(not r["parsed"] for r in cells[name])} for name, values in scores.items()}
    table["overall"] = bootstrap_cells(list(scores.values()), seed)._asdict() | {"cells": sum(map(bool, scores.values()))}
    table["per question"] = bootstrap([r["score"] for r in rows], seed=seed)._asdict()
    return table


def table_2(judged: Sequence[dict]) -> dict:
    """Table 2's form, the aim of Eq. (2): the same choice questions on the clean picture and on it damaged at each level."""
    shown = sorted({r["shown"] for r in judged} - {"as is", "clean"}, key=float)
    table = {}
    for name in ["clean", *shown]:
        cell = [r for r in judged if r["shown"] == name and r["score"] is not None]
        if cell:
            unparsed = sum(not r["parsed"] for r in cell)
            table[name] = wilson(sum(r["score"] for r in cell), len(cell))._asdict() | {"unparsed": unparsed}
    return table


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
    out = {"summary": {name: e._asdict() for name, e in summary(damaged(judged), seed).items()},
           "table_1": table_1(judged, seed), "table_2": table_2(judged)}
    if not any(row["plain"] for row in rows):
        out["figure_6"] = figure_6(judged, seed)
    return out


# ---------------------------------------------------------------- as text

def cell(estimate: dict | None) -> str:
    """`0.713 [0.66, 0.76] n 150`, and how many answers could not be read, if any."""
    if estimate is None or estimate["value"] is None:
        return "-"
    digits = 1 if abs(estimate["value"]) >= 10 else 3
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    unread = f", {estimate['unparsed']} unread" if estimate.get("unparsed") else ""
    missing = f", {estimate['cells']} of 9 cells" if estimate.get("cells", 9) < 9 else ""
    return f"{value} [{low}, {high}] n {estimate['n']}{unread}{missing}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well as it stands."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    line = lambda texts: "| " + " | ".join(text.ljust(width) for text, width in zip(texts, widths)) + " |"
    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])
