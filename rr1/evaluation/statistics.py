"""How sure a figure is: 95 % intervals, and differences between two models on the same records."""
from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import numpy as np

Z = 1.959964                         # 95 % of a normal distribution lies within this many deviations
DRAWS = 2000                         # bootstrap resamples


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


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test: of gained + lost questions that two models answer differently, how probable is a split at least this
    uneven if neither model is better? Two-sided p-value, from the binomial distribution with a half; 1 where none differs."""
    n, ways, tail = gained + lost, 1, 0
    for k in range(min(gained, lost) + 1):                    # ways: n choose k
        tail, ways = tail + ways, ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


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


# ---------------------------------------------------------------- as cells of Markdown tables

def cell(estimate: dict | None) -> str:
    """`0.713 [0.66, 0.76] n 150`, how many answers could not be read, and by what it was scored, if not exactly."""
    if estimate is None or estimate["value"] is None:
        return "-"
    digits = 1 if abs(estimate["value"]) >= 10 else 3
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    unread = f", {estimate['unparsed']} unread" if estimate.get("unparsed") else ""
    missing = f", {estimate['cells']} of 9 cells" if estimate.get("cells", 9) < 9 else ""
    by = f", {estimate['by']}" if estimate.get("by") else ""
    return f"{value} [{low}, {high}] n {estimate['n']}{unread}{missing}{by}"


def interval(e: dict) -> str:
    """`+0.141 [+0.102, +0.180]`, bold if 0 is outside."""
    if e["value"] is None:
        return "-"
    text = f"{e['value']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}]"
    return f"**{text}**" if e["low"] > 0 or e["high"] < 0 else text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well as it stands."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    line = lambda texts: "| " + " | ".join(text.ljust(width) for text, width in zip(texts, widths)) + " |"
    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])
