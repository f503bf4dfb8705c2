"""Figure 6 of a chain model: which damage is taken for which, how strong, how long the chain."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from degrade import DEGRADATIONS, Degradation
from rr1.evaluation.metrics import LEVELS, Rows, grouped, is_damaged, strength, summary
from rr1.evaluation.statistics import bootstrap, wilson

TYPES = (*DEGRADATIONS, "other")  # "other": a name that is not one of the sixteen
WIDTH = 0.25  # of the bins of total intensity in (B)


def figure_6(judged: Rows) -> dict:
    """Figure 6 of a chain model: (A) types and intensities on damaged pictures, (B) chain length.

    "intensity" and "length" are curves: a list of bins with their n. "type_f1" is by level of the
    damage; "clean_called_damaged": the share of clean pictures of which any damage is claimed.
    """
    own = [row for row in judged if row["shown"] == "as is"]
    hurt = [row for row in own if is_damaged(row)]
    clean = [row for row in own if not row["true_types"]]
    claims = [bool(row["said"]) for row in clean]
    pairs = [(row["said"], row["true_types"]) for row in hurt]
    return {
        "confusion": confusion(pairs).tolist(),
        "intensity": curve(intensity_points(hurt), ["true"]),
        "length": curve(length_points(own), ["total", "truth"]),
        "type_f1": type_f1_by_level(hurt),
        "clean_called_damaged": wilson(sum(claims), len(claims))._asdict(),
    }


def type_f1_by_level(hurt: Rows) -> dict:
    by_level = grouped(hurt, map(strength, hurt))
    found = {}
    for level in LEVELS:
        if level in by_level:
            found[level] = summary(by_level[level])["type_f1"]._asdict()
    return found


def confusion(pairs: Iterable[tuple[list, list]]) -> np.ndarray:
    """(predicted, true) degradations -> counts (18, 18): which type is taken for which.

    Rows: the TYPES as they are, then "invented"; columns: the TYPES as named, then "missed". Types
    that are both true and named stand on the diagonal. What is left over on both sides was mistaken
    for each other; where it cannot be said which for which (two against one, two against two) each
    pair gets an equal part. So a row sums to how often its type is true, a column to how often it
    is named. Intensities play no part.
    """
    counts = np.zeros((len(TYPES) + 1, len(TYPES) + 1))
    for predicted, truth in pairs:
        named = count_by_type(predicted)  # (17,)
        true = count_by_type(truth)
        right = np.minimum(named, true)
        left = true - right
        wrong = named - right
        parts = max(1, left.sum(), wrong.sum())
        mistaken = np.outer(left, wrong) / parts  # (17, 17)
        counts[:-1, :-1] += np.diag(right) + mistaken
        counts[:-1, -1] += left - mistaken.sum(1)
        counts[-1, :-1] += wrong - mistaken.sum(0)
    return counts


def count_by_type(side: list[Degradation]) -> np.ndarray:
    """How often each of the TYPES is among them, (17,)."""
    counts = np.zeros(len(TYPES), int)
    for type, _ in side:
        name = type if type in DEGRADATIONS else "other"
        counts[TYPES.index(name)] += 1
    return counts


def intensity_points(judged: Rows) -> list[tuple]:
    """(fifth, true, said) intensities of the types that are true once and named once."""
    points = []
    for row in judged:
        named = count_by_type(row["said"])
        true = count_by_type(row["true_types"])
        said = dict(row["said"])
        for type, s in row["true_types"]:
            place = TYPES.index(type)
            if named[place] == true[place] == 1 and 0 <= s <= 1:
                fifth = min(4, int(5 * s))
                points.append((fifth, s, said[type]))
    return points


def length_points(judged: Rows) -> list[tuple]:
    """(bin, total intensity, true length, length); bin 0 is clean, bin k from (k - 1) WIDTH on."""
    points = []
    for row in judged:
        if row["truth_length"]:
            place = math.ceil(row["total"] / WIDTH)
            points.append((place, row["total"], row["truth_length"], row["length"]))
    return points


def curve(points: list[tuple], names: Sequence[str]) -> list[dict]:
    """Points (bin, x .., y) -> for each bin the mean of each x, by name, and of y an estimate."""
    bins = {}
    for place, *values in points:
        bins.setdefault(place, []).append(values)
    found = []
    for place in sorted(bins):
        *xs, y = np.array(bins[place], float).T
        means = {name: float(x.mean()) for name, x in zip(names, xs)}
        found.append(means | bootstrap(y)._asdict())
    return found
