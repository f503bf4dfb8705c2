"""Estimates as cells of Markdown tables."""
from __future__ import annotations

from typing import Sequence


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
