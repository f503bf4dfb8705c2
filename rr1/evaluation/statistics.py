"""How sure a figure is: 95 % intervals, and differences between two models on the same records."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959964  # 95 % of a normal distribution lies within so many standard deviations
DRAWS = 2000  # bootstrap resamples
Values = Sequence[float] | np.ndarray


class Estimate(NamedTuple):
    """A value with its 95 % interval over n observations; all None where n = 0."""

    value: float | None
    low: float | None
    high: float | None
    n: int


NOTHING = Estimate(None, None, None, 0)


def wilson(right: float, n: int) -> Estimate:
    """A share right / n with Wilson's score interval: inside [0, 1], and not empty at 0 or 1."""
    if n == 0:
        return NOTHING
    p = right / n
    shrink = 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def bootstrap(numerators: Values, denominators: Values | None = None) -> Estimate:
    """sum(numerators) / sum(denominators) over records, which are resampled; percentile interval.

    Without denominators it is the mean. n counts the records whose denominator is not 0.
    """
    above = np.asarray(numerators, float)
    below = np.ones_like(above)
    if denominators is not None:
        below = np.asarray(denominators, float)
    n = int(np.count_nonzero(below))
    if n == 0:
        return NOTHING
    picks = _picks(len(above))
    with np.errstate(invalid="ignore"):  # a resample in which nothing counts is no number
        draws = above[picks].sum(1) / below[picks].sum(1)
    return _estimate(above.sum() / below.sum(), draws, n)


def bootstrap_cells(cells: Sequence[Values]) -> Estimate:
    """The plain mean of the cells' means, each cell resampled within itself.

    Empty cells are left out. n: observations.
    """
    cells = [np.asarray(cell, float) for cell in cells if len(cell)]
    if not cells:
        return NOTHING
    means, draws = [], []
    for i, cell in enumerate(cells):
        means.append(cell.mean())
        picks = _picks(len(cell), i)
        draws.append(cell[picks].mean(1))  # (DRAWS,)
    return _estimate(np.mean(means), np.mean(draws, 0), sum(map(len, cells)))


def paired_difference(after: Values, before: Values) -> Estimate:
    """How much `after` is above `before` in the mean: what makes a record hard falls out.

    Both are over the same records in the same order; ValueError if there are not as many.
    """
    if len(after) != len(before):
        counts = f"{len(after)} records after and {len(before)} before"
        raise ValueError(f"{counts}: a paired difference needs the same records")
    return bootstrap(np.subtract(after, before))


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test: the two-sided p-value of a split at least so uneven.

    Of gained + lost questions that two models answer differently, each is gained with probability
    1/2 if neither model is better. 1 where none differs.
    """
    n = gained + lost
    ways = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * ways / 2**n)


def _picks(n: int, seed: int = 0) -> np.ndarray:
    """(DRAWS, n) records, drawn with replacement; the same whenever they are drawn."""
    return np.random.default_rng(seed).integers(n, size=(DRAWS, n))


def _estimate(value: float, draws: np.ndarray, n: int) -> Estimate:
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high), n)


# ---------------------------------------------------------------- as cells of Markdown tables


def cell(estimate: dict | None) -> str:
    """`0.713 [0.66, 0.76] n 150`, how many answers could not be read, by what it was scored."""
    if estimate is None or estimate["value"] is None:
        return "-"
    digits = 1 if abs(estimate["value"]) >= 10 else 3
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    text = f"{value} [{low}, {high}] n {estimate['n']}"
    if estimate.get("unparsed"):
        text += f", {estimate['unparsed']} unread"
    if estimate.get("cells", 9) < 9:
        text += f", {estimate['cells']} of 9 cells"
    if estimate.get("by"):
        text += f", {estimate['by']}"
    return text


def interval(e: Estimate) -> str:
    """`+0.141 [+0.102, +0.180]`, bold if 0 is outside."""
    if e.value is None:
        return "-"
    text = f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"
    is_clear = e.low > 0 or e.high < 0
    return f"**{text}**" if is_clear else text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well as it stands."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = []
    for row in (header, *rows):
        cells = [text.ljust(width) for text, width in zip(row, widths)]
        lines.append(f"| {' | '.join(cells)} |")
    rule = "|".join("-" * (width + 2) for width in widths)
    lines.insert(1, f"|{rule}|")
    return "\n".join(lines)
