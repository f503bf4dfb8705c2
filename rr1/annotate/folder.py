"""The folder of a data set: what is done, what was rejected, and the forms it is read in."""

import fcntl
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Mapping, Sequence

from rr1 import files
from rr1.annotate.questions import Source
from rr1.annotate.teachers import Rejected

# What LLaMA-Factory has to know of llamafactory.json
DATASET_INFO = {
    "file_name": "llamafactory.json",
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "images": "images"},
}


@contextmanager
def begun(
    path: Path, settings: Mapping, free: Sequence[str], defaults: Mapping
) -> Iterator[None]:
    """Make the folder, for this process alone.

    SystemExit if it was begun with other settings (`free` ones apart), or another process has it.
    """
    for name in ("images", "clean"):
        (path / name).mkdir(parents=True, exist_ok=True)
    with open(path / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            advice = "let it end, or give another --out"
            raise SystemExit(
                f"{path}: another process is writing to it: {advice}"
            ) from None
        files.begin(path, settings, free, defaults)
        yield


class Folder:
    """The rows of train.jsonl and rejected.jsonl by their ids; each addition is on disk at once."""

    def __init__(self, path: Path):
        self.path, self.train, self.bad = (
            path,
            path / "train.jsonl",
            path / "rejected.jsonl",
        )
        self.done = {row["id"]: row for row in files.read_lines(self.train)}
        self.rejected = {}
        for row in files.read_lines(self.bad):
            if row["id"] not in self.done and not row["again"]:
                self.rejected[row["id"]] = row

    def forget(self, sources: Sequence[Source], wanted: Sequence[Source]) -> int:
        """Forget rows of questions that are no longer asked, or otherwise; returns how many."""
        asked = {source.id for source in sources}
        fingerprints = {source.id: source.fingerprint() for source in wanted}
        before = {**self.rejected, **self.done}
        for id, row in before.items():
            old = row.get("fingerprint")
            if id not in asked or fingerprints.get(id, old) != old:
                self.done.pop(id, None)
                self.rejected.pop(id, None)
        return len(before) - len(self.done) - len(self.rejected)

    def add(self, row: dict) -> None:
        self.rejected.pop(row["id"], None)
        self.done[row["id"]] = row
        files.append_lines(self.train, [row])

    def reject(self, source: Source, error: Rejected) -> None:
        row = {
            "id": source.id,
            "step": error.step,
            "reason": error.reason,
            "answer": error.answer,
            "again": error.again,
            "attempts": self.attempts(source.id),
            "fingerprint": source.fingerprint(),
        }
        self.rejected[source.id] = row
        files.append_lines(self.bad, [row])

    def attempts(self, id: str) -> dict[str, int]:
        """Which attempt to make at each step (0 where absent): one more where it was rejected."""
        if id not in self.rejected:
            return {}
        attempts, step = self.rejected[id]["attempts"], self.rejected[id]["step"]
        return attempts | {step: attempts.get(step, 0) + 1}

    def finish(self, order: Sequence[str]) -> list[dict]:
        """Write all files anew, the rows in the order of these ids; returns the rows.

        LLaMA-Factory is given those that have a chain.
        """
        rows = [self.done[id] for id in order if id in self.done]
        files.write_text(self.train, files.lines_of(rows))
        files.write_text(self.bad, files.lines_of(self.rejected.values()))
        llama_factory = []
        for row in rows:
            if "length" not in row:
                turns = {"conversations": row["conversations"], "images": [row["image"]]}
                llama_factory.append(turns)
        if llama_factory:
            files.write_json(self.path / "llamafactory.json", llama_factory)
            files.write_json(self.path / "dataset_info.json", {"rr1": DATASET_INFO})
        return rows
