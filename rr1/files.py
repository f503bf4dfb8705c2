"""Files that are written whole or not at all, and JSON in them."""

import json
import os
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text, where tensors and arrays become lists and anything else (paths) a string."""
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _write(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file of a temporary name, and give it its own name when it is whole."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)


def write_bytes(path: str | Path, content: bytes) -> None:
    _write(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    write_text(path, to_json(value, indent) + "\n")


def save_figure(figure: Any, path: str | Path) -> None:
    """Save a matplotlib figure as a PNG."""
    _write(path, lambda temporary: figure.savefig(temporary, format="png"))


def lines_of(rows: Iterable[Mapping]) -> str:
    """Rows as JSON lines."""
    return "".join(to_json(row) + "\n" for row in rows)


def append_lines(path: str | Path, rows: Iterable[Mapping]) -> None:
    """Add rows to a file of JSON lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(lines_of(rows))


def read_lines(path: str | Path) -> list[dict]:
    """The rows of a file of JSON lines that only ever grows; none if there is no file.

    Half a line at its end, which a killed process left, is cut off. SystemExit names a broken line.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise SystemExit(
                f"{path}:{number}: not JSON ({error}): repair or delete the line"
            ) from None
    return rows


def cut_back(path: Path, step: int) -> list[dict]:
    """Drop the rows of a .jsonl file that come after `step`; return the rest."""
    rows = [row for row in read_lines(path) if row["step"] <= step]
    if path.exists():
        write_text(path, lines_of(rows))
    return rows


def same_settings(
    path: str | Path,
    settings: Mapping,
    free: Iterable[str] = (),
    advice: str = "Give the old values, or another --out.",
    defaults: Mapping | None = None,
) -> None:
    """SystemExit, with what differs, if the JSON file `path` holds other settings than these, but
    for those in `free`.

    A setting that the file does not have yet is taken to have been its value in `defaults`. One
    that only the file has is one that an earlier version had: it says nothing.
    """
    path = Path(path)
    if not path.exists():
        return
    old = {**(defaults or {}), **json.loads(path.read_text(encoding="utf-8"))}
    new = json.loads(to_json(settings))
    changed = []
    for name in sorted(set(new) - set(free)):
        if old.get(name) != new[name]:
            changed.append(f"  {name}: was {old.get(name)!r}, now {new[name]!r}")
    if changed:
        raise SystemExit(
            "\n".join([f"{path.parent} was begun with other settings:", *changed, advice])
        )


def begin(
    folder: Path, settings: Mapping, free: Iterable[str], defaults: Mapping | None = None
) -> None:
    """Make a folder with these settings in config.json, or go on with it: `same_settings`."""
    path = folder / "config.json"
    same_settings(path, settings, free, defaults=defaults)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
