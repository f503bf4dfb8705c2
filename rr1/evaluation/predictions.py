"""The folder of one model's predictions: meta.json says how they were made, predictions.jsonl holds one row a job.

While they are made, each process adds whole lines to a file of its own; killed at any moment, what is there is found again.
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rr1.files import to_json, write_text


def check_meta(folder: Path, meta: dict) -> None:
    """Predictions of other weights, or made in another way, are not mixed with these."""
    path = folder / "meta.json"
    if not path.exists() or not read_predictions(folder):
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"  {name}: was {old.get(name)!r}, now {meta[name]!r}" for name in meta if old.get(name) != meta[name]]
    if any(not line.startswith("  model: ") for line in changed):                   # the same weights may lie elsewhere now
        raise SystemExit("\n".join([f"{folder} holds predictions that were made otherwise:", *changed, "Give another --out, "
                                    "delete that folder to predict anew, or use --score-only to report on what it holds."]))


def fingerprint(name: str | Path) -> str:
    """A hash of a file, or of a checkpoint folder's safetensors files; of a hub id, the id."""
    digest = hashlib.sha256()
    files = sorted(Path(name).glob("*.safetensors")) or [Path(name)]
    for path in files if files[0].is_file() else ():
        with open(path, "rb") as file:
            while piece := file.read(2**22):
                digest.update(piece)
    return digest.hexdigest() if files[0].is_file() else str(name)


def read_predictions(folder: Path) -> list[dict]:
    """The rows on disk, from the files of all processes, each once. The half-written last line of a killed run is not one."""
    rows = {}
    for path in sorted(folder.glob("predictions*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except ValueError:
                pass
    return list(rows.values())


def collect(folder: Path, order: dict[str, int]) -> None:
    """Bring all rows into predictions.jsonl, whole lines only, in the order of the jobs."""
    rows = sorted(read_predictions(folder), key=lambda row: order.get(row["key"], len(order)))
    write_text(folder / "predictions.jsonl", "".join(to_json(row) + "\n" for row in rows))
    for path in folder.glob("predictions.*.jsonl"):
        path.unlink()
