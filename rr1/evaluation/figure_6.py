"""Figure 6 of a chain model: which damage is taken for which, how strong, how long the chain."""

import math
from collections.abc import Sequence

import numpy as np

from degrade import DEGRADATIONS, Degradation
from rr1.evaluation.metrics import is_damaged
from rr1.evaluation.statistics import bootstrap, wilson

TYPES = (*DEGRADATIONS, "other")  # "other": a name that is not one of the sixteen
WIDTH = 0.25  # of the bins of total intensity in (B)


def figure_6(judged: Sequence[dict], seed: int = 0) -> dict:
    """Figure 6 of a chain model: (A) types and intensities on damaged pictures, (B) chain length.

    "intensity" and "length" are curves: a list of bins with their n. "clean_called_damaged": the
    share of the data's clean pictures of which any damage is claimed.
    """
    own = [row for row in judged if row["shown"] == "as is"]
    hurt = [row for row in own if is_damaged(row)]
    claims = [bool(row["said"]) for row in own if not row["true_types"]]
    return {
        "confusion": confusion([(row["said"], row["true_types"]) for row in hurt]).tolist(),
        "intensity": curve(intensity_points(hurt), ["true"], seed),
        "length": curve(length_points(own), ["total", "truth"], seed),
        "clean_called_damaged": wilson(sum(claims), len(claims))._asdict(),
    }


def confusion(pairs: Sequence[tuple[list[Degradation], list[Degradation]]]) -> np.ndarray:
    """(predicted, true) degradations -> counts (18, 18): which type is taken for which.

    Rows: the TYPES as they are, then "invented"; columns: the TYPES as named, then "missed". Types
    that are both true and named stand on the diagonal. What is left over on both sides was mistaken
    for each other; where it cannot be said which for which (two against one, two against two) each
    pair gets an equal part. So a row sums to how often its type is true, a column to how often it
    is named. Intensities play no part.
    """
    counts = np.zeros((len(TYPES) + 1, len(TYPES) + 1))
    for predicted, truth in pairs:
        named, true = count_by_type(predicted), count_by_type(truth)  # (17,)
        right = np.minimum(named, true)
        left, wrong = true - right, named - right
        mistaken = np.outer(left, wrong) / max(1, left.sum(), wrong.sum())  # (17, 17)
        counts[:-1, :-1] += np.diag(right) + mistaken
        counts[:-1, -1] += left - mistaken.sum(1)
        counts[-1, :-1] += wrong - mistaken.sum(0)
    return counts


def count_by_type(side: list[Degradation]) -> np.ndarray:
    names = [type if type in DEGRADATIONS else "other" for type, _ in side]
    return np.array([names.count(type) for type in TYPES])


def intensity_points(judged: Sequence[dict]) -> list[tuple]:
    """(fifth, true, said) intensities of the types that are true once and named once."""
    points = []
    for row in judged:
        named, true = (count_by_type(row[side]) for side in ("said", "true_types"))
        said = dict(row["said"])
        for type, s in row["true_types"]:
            place = TYPES.index(type)
            if named[place] == true[place] == 1:
                points.append((min(4, int(5 * s)), s, said[type]))
    return points


def length_points(judged: Sequence[dict]) -> list[tuple]:
    """(bin, total intensity, true length, length); bin 0 is clean, bin k from (k - 1) WIDTH on."""
    return [
        (math.ceil(row["total"] / WIDTH), row["total"], row["truth_length"], row["length"])
        for row in judged
        if row["truth_length"]
    ]


def curve(points: list[tuple], names: Sequence[str], seed: int) -> list[dict]:
    """Points (bin, x .., y) -> for each bin the mean of each x, by name, and of y an estimate."""
    found = []
    for place in sorted({point[0] for point in points}):
        _, *xs, y = zip(*(point for point in points if point[0] == place))
        means = [float(np.mean(x)) for x in xs]
        found.append(dict(zip(names, means)) | bootstrap(y, seed=seed)._asdict())
    return found
