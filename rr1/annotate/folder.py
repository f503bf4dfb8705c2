"""The folder of a data set: what is done and what was rejected, and the forms it is read in."""

from pathlib import Path
from typing import Iterable, Mapping, Sequence

from rr1 import files
from rr1.annotate.teachers import Rejected

# What LLaMA-Factory has to know of llamafactory.json
DATASET_INFO = {
    "file_name": "llamafactory.json",
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "images": "images"},
}


class Folder:
    """The rows of train.jsonl and rejected.jsonl by their ids; each addition is on disk at once."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.train, self.bad = self.path / "train.jsonl", self.path / "rejected.jsonl"
        self.done = {row["id"]: row for row in files.read_lines(self.train)}
        rejected = {row["id"]: row for row in files.read_lines(self.bad)}
        self.rejected = {id: row for id, row in rejected.items() if id not in self.done}

    def begin(self, settings: Mapping, free: Iterable[str], defaults: Mapping) -> None:
        """Make the folder; SystemExit if it was begun with other settings, `free` ones apart."""
        files.same_settings(self.path / "config.json", settings, free, defaults=defaults)
        for name in ("images", "clean"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        files.write_json(self.path / "config.json", settings)

    def add(self, row: dict) -> None:
        self.done[row["id"]] = row
        files.append_lines(self.train, [row])

    def reject(self, id: str, error: Rejected) -> None:
        row = {"id": id, "step": error.step, "reason": error.reason, "answer": error.answer}
        row["attempts"] = self.attempts(id)
        self.rejected[id] = row
        files.append_lines(self.bad, [row])

    def attempts(self, id: str) -> dict[str, int]:
        """Which attempt to make at each step (0 where absent): one more where it was rejected."""
        if id not in self.rejected:
            return {}
        row = self.rejected[id]
        return row["attempts"] | {row["step"]: row["attempts"].get(row["step"], 0) + 1}

    def finish(self, order: Sequence[str]) -> list[dict]:
        """Write all files anew, the rows in the order of these ids; returns the rows."""
        rows = [self.done[id] for id in order if id in self.done]
        self.rejected = {id: row for id, row in self.rejected.items() if id not in self.done}
        files.write_text(self.train, files.lines_of(rows))
        files.write_text(self.bad, files.lines_of(self.rejected.values()))
        llama_factory = [
            {"conversations": row["conversations"], "images": [row["image"]]} for row in rows
        ]
        files.write_json(self.path / "llamafactory.json", llama_factory)
        files.write_json(self.path / "dataset_info.json", {"rr1": DATASET_INFO})
        return rows
