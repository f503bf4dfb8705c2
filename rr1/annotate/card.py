"""What a data set of chains holds, as a page of text and a picture: types by stage, intensities, chain length against total
intensity (Figure 3's shape), vocabulary."""
from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from degrade import STAGES
from rr1.chain import parse
from rr1.files import write_text

COLORS = dict(zip(STAGES, ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")))


def write(rows: Sequence[dict], out: Path, rejected: Sequence[dict], paid: str, target: Callable[[float], int]) -> str:
    """Write out/card.txt and out/card.png for lines of train.jsonl; returns the text. `target`: words for a total intensity."""
    types = Counter(d["type"] for row in rows for d in row["degradations"])
    intensities = np.array([d["intensity"] for row in rows for d in row["degradations"]])
    totals = np.array([sum(d["intensity"] for d in row["degradations"]) for row in rows])
    chains = [row["conversations"][1]["value"] for row in rows]
    lengths = np.array([len(chain.split()) for chain in chains])
    words = Counter(word for chain in chains for word in prose(chain))
    text = "\n".join(_lines(rows, types, intensities, totals, lengths, words, rejected, paid, target)) + "\n"
    write_text(out / "card.txt", text)
    temporary = out / "card.png.tmp"
    _draw(types, intensities, totals, lengths, words, target).savefig(temporary, format="png")
    os.replace(temporary, out / "card.png")
    return text


def prose(chain: str) -> list[str]:
    """The words of a chain's three texts, in lower case."""
    read = parse(chain)
    return re.findall(r"[a-z]+(?:'[a-z]+)?", " ".join(filter(None, (read.influence, read.reasoning, read.conclusion))).lower())


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() and y.std() else None


def _lines(rows, types, intensities, totals, lengths, words, rejected, paid, target) -> list[str]:
    r = correlation(totals, lengths)
    aim = np.array([target(total) for total in totals])
    lines = [f"{len(rows)} questions, {sum(types.values())} degradations ({sum(types.values()) / len(rows):.2f} a picture), "
             f"{sum(bool(row['choices']) for row in rows)} with choices", paid, ""]
    for stage, names in STAGES.items():
        lines.append(f"{stage} {sum(types[name] for name in names)}: " + ", ".join(f"{name} {types[name]}" for name in names))
    counts, edges = np.histogram(intensities, bins=10, range=(0, 1))
    lines += ["", "intensities: " + "  ".join(f"{low:.1f}+ {n}" for low, n in zip(edges, counts)),
              f"total intensity of a picture: mean {totals.mean():.2f}, from {totals.min():.2f} to {totals.max():.2f}",
              f"words of a chain: mean {lengths.mean():.0f}, from {lengths.min()} to {lengths.max()}; "
              + ("" if r is None else f"correlation with total intensity {r:.2f}; ")
              + f"mean distance from the target {np.abs(lengths - aim).mean():.0f}"]
    n = sum(words.values())
    lines += [f"vocabulary: {len(words)} different words of {n}; most used: " + ", ".join(word for word, _ in common(words, 12))]
    reasons = Counter(f"{row['step']}: {re.sub(r'[0-9]+', 'n', row['reason'])[:60]}" for row in rejected)
    lines += [f"rejected: {len(rejected)}", *(f"  {count} {reason}" for reason, count in reasons.most_common(8))]
    return lines


def common(words: Counter, n: int) -> list[tuple[str, int]]:
    """The n most used words of five letters or more: shorter ones are mostly grammar."""
    return [(word, count) for word, count in words.most_common() if len(word) > 4][:n]


def _draw(types, intensities, totals, lengths, words, target) -> Figure:
    figure = Figure(figsize=(13, 8), dpi=100, layout="constrained")
    (by_type, by_intensity), (by_length, by_word) = figure.subplots(2, 2)
    names = [(stage, name) for stage, members in STAGES.items() for name in members][::-1]
    by_type.barh([name for _, name in names], [types[name] for _, name in names], color=[COLORS[stage] for stage, _ in names])
    for stage, color in COLORS.items():
        by_type.barh([names[0][1]], [0], color=color, label=stage)
    by_type.legend(frameon=False, fontsize=8)
    by_type.set(title="types, by stage", xlabel="degradations")
    by_intensity.hist(intensities, bins=20, range=(0, 1), color="#7f7f7f", edgecolor="white")
    by_intensity.set(title="intensities", xlabel="s", ylabel="degradations")

    by_length.plot(totals, lengths, ".", color="#1f77b4", alpha=0.35, markersize=5, label="chains")
    bins = np.floor(totals / 0.25)
    centers = [(totals[bins == b].mean(), lengths[bins == b].mean()) for b in np.unique(bins)]
    by_length.plot(*zip(*centers), "o-", color="#d62728", label="mean, by quarters")
    line = np.linspace(totals.min(), totals.max(), 20)
    by_length.plot(line, [target(x) for x in line], "--", color="black", linewidth=1, label="target, Eq. (7)")
    by_length.set(title="chain length against damage", xlabel="total intensity, sum of s", ylabel="words", ylim=(0, None))
    by_length.legend(frameon=False, fontsize=8)
    top = common(words, 16)[::-1]
    by_word.barh([word for word, _ in top], [count for _, count in top], color="#7f7f7f")
    by_word.set(title=f"vocabulary: {len(words)} different words of {sum(words.values())}", xlabel="times used, of five letters or more")
    for axes in (by_type, by_intensity, by_length, by_word):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
