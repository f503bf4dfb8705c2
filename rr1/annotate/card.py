"""What a data set of chains holds, as a page of text and a picture.

Types by stage, intensities, and chain length against total intensity (Figure 3's shape).
"""

import re
from collections import Counter
from pathlib import Path
from typing import Sequence

import numpy as np
from matplotlib.figure import Figure

from degrade import STAGES
from rr1 import files

COLORS = dict(zip(STAGES, ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")))


def total_intensity(row: dict) -> float:
    """The sum of s over a picture's degradations."""
    return sum(d["intensity"] for d in row["degradations"])


class Card:
    """The figures of a data set: lines of train.jsonl, and the words each chain should have."""

    def __init__(self, rows: Sequence[dict], aims: Sequence[int]):
        self.rows, self.aims = rows, np.array(aims)
        damages = [d for row in rows for d in row["degradations"]]
        self.types = Counter(d["type"] for d in damages)
        self.intensities = [d["intensity"] for d in damages]
        self.totals = np.array([total_intensity(row) for row in rows])
        self.chains = [row["conversations"][1]["value"] for row in rows]
        self.words = np.array([len(chain.split()) for chain in self.chains])

    def text(self, rejected: Sequence[dict], paid: str) -> str:
        """`rejected`: lines of rejected.jsonl; `paid`: what the teacher cost."""
        n, total, words = len(self.rows), self.totals, self.words
        with_choices = sum(bool(row["choices"]) for row in self.rows)
        lines = [
            f"{n} questions, {len(self.intensities)} degradations "
            f"({len(self.intensities) / n:.2f} a picture), {with_choices} with choices",
            f"{paid}\n",
        ]
        for stage, names in STAGES.items():
            counts = ", ".join(f"{name} {self.types[name]}" for name in names)
            lines.append(f"{stage} {sum(self.types[name] for name in names)}: {counts}")
        counts, edges = np.histogram(self.intensities, bins=10, range=(0, 1))
        vary = total.std() > 0 and words.std() > 0
        correlation = f"{np.corrcoef(total, words)[0, 1]:.2f}" if vary else "undefined"
        vocabulary = set(re.findall(r"[a-z']+", " ".join(self.chains).lower()))
        lines += [
            "\nintensities: "
            + "  ".join(f"{s:.1f}+ {count}" for s, count in zip(edges, counts)),
            "total intensity of a picture: "
            f"mean {total.mean():.2f}, from {total.min():.2f} to {total.max():.2f}",
            f"words of a chain: mean {words.mean():.0f}, from {words.min()} to {words.max()}; "
            f"correlation with total intensity {correlation}; "
            f"mean distance from the target {np.abs(words - self.aims).mean():.0f}",
            f"vocabulary: {len(vocabulary)} different words",
            f"rejected: {len(rejected)}",
        ]
        reasons = Counter(f"{row['step']}: {row['reason'][:60]}" for row in rejected)
        lines += [f"  {count} {reason}" for reason, count in reasons.most_common(8)]
        return "\n".join(lines) + "\n"

    def figure(self) -> Figure:
        figure = Figure(figsize=(15, 5), dpi=90, layout="constrained")
        by_type, by_intensity, by_length = figure.subplots(1, 3)
        for stage, names in STAGES.items():
            counts = [self.types[name] for name in names]
            by_type.barh(names, counts, color=COLORS[stage], label=stage)
        by_type.invert_yaxis()
        by_type.margins(x=0.45)  # room for the legend
        by_type.set(title="types, by stage", xlabel="degradations")
        by_intensity.hist(self.intensities, bins=20, range=(0, 1), edgecolor="white")
        by_intensity.set(title="intensities", xlabel="s", ylabel="degradations")
        by_length.plot(self.totals, self.words, ".", alpha=0.35, label="chains")
        order = np.argsort(self.totals)
        by_length.plot(self.totals[order], self.aims[order], "k--", label="target, Eq. (7)")
        by_length.set(
            title="chain length", xlabel="total intensity, sum of s", ylabel="words"
        )
        by_length.set_ylim(0)
        by_type.legend(frameon=False)
        by_length.legend(frameon=False)
        return figure

    def write(self, out: Path, rejected: Sequence[dict], paid: str) -> str:
        """Write out/card.txt and out/card.png; returns the text."""
        text = self.text(rejected, paid)
        files.write_text(out / "card.txt", text)
        files.save_figure(self.figure(), out / "card.png")
        return text
