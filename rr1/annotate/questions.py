"""The files on both sides of the data construction: questions about photos go in, a data set comes out.

    {"image": "photos/7.jpg", "question": "what is it?", "choices": ["cat", "dog"], "answer": "dog"}     # a question; or A-OKVQA's json
"""
from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple, Sequence

from rr1.chain import Chain, build_question
from rr1.answers import choice_index
from rr1.files import to_json, write_text

# ---------------------------------------------------------------- the questions


class Truth(NamedTuple):
    """Y_GT: the question, its choices (None if open) and its true answer: the choice's index, or the text."""
    question: str
    choices: list[str] | None
    answer: str

    @property
    def answer_text(self) -> str:
        return self.choices[int(self.answer)] if self.choices else self.answer

    def __str__(self) -> str:
        number = f"{self.answer}. " if self.choices else ""
        return f"{build_question(self.question, self.choices)}\nTrue answer: {number}{self.answer_text}"


class Source(NamedTuple):
    """One line of the questions: where it stands, its photo, what is asked."""
    id: str
    photo: Path
    truth: Truth


def read_questions(path: Path, images: str = "") -> list[Source]:
    """A-OKVQA's json, or JSON lines of image, question, choices (absent or null: an open question), answer (index, letter or
    text) and perhaps id. SystemExit names the file, the entry and the field that is wrong."""
    if not path.is_file():
        raise SystemExit(f"--data {path}: not a file; give A-OKVQA's json, or JSON lines of image, question, choices, answer")
    folder, text = Path(images) if images else path.parent, path.read_text(encoding="utf-8")
    whole = text.lstrip().startswith("[")
    found, seen = [], {}
    try:
        rows = [(f"{path}, entry {n}", row) for n, row in enumerate(json.loads(text), start=1)] if whole else \
               [(f"{path}:{n}", line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    except ValueError as error:
        raise SystemExit(f"{path}: not JSON ({error})") from None
    for number, (where, row) in enumerate(rows, start=1):
        try:
            source = _source(row if whole else json.loads(row), folder, f"{path.stem}-{number:06d}")
        except json.JSONDecodeError as error:
            raise SystemExit(f"{where}: not JSON ({error})") from None
        except (KeyError, TypeError, ValueError) as error:
            what = str(error) if isinstance(error, ValueError) else f"field {error} is missing or of the wrong kind"
            raise SystemExit(f"{where}: {what}") from None
        if source.id in seen:
            raise SystemExit(f"{where}: the id {source.id!r} is that of {seen[source.id]} too")
        seen[source.id] = where
        found.append(source)
    if not found:
        raise SystemExit(f"{path}: holds no questions")
    return found


def _source(row: dict, folder: Path, number: str) -> Source:
    photo = folder / (row["image"] if "image" in row else f"{row['split']}2017/{row['image_id']:012}.jpg")
    if not photo.is_file():
        raise ValueError(f"there is no photo {photo}: --images gives the folder that paths are relative to")
    if not photo.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{photo} leads to {photo.resolve()}, out of the image folder: move the picture, or give another --images")
    question, choices = row["question"], row.get("choices") or None
    if not isinstance(question, str) or choices is not None and not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"question is {question!r}, choices {choices!r}; expected a text, and a list of texts or null")
    if "answer" in row or "correct_choice_idx" in row:
        answer = str(row["answer"] if "answer" in row else row["correct_choice_idx"])
    elif row.get("direct_answers"):
        [(answer, _)] = Counter(row["direct_answers"]).most_common(1)
    else:
        raise ValueError("no answer; expected answer, correct_choice_idx or direct_answers (A-OKVQA's test part has none)")
    if choices:
        index = choice_index(answer, choices)
        if index is None:
            raise ValueError(f"answer {answer!r} is none of the choices {choices}")
        answer = str(index)
    Chain(answer=answer)  # ValueError for an answer with a tag in it
    return Source(str(row.get("id", row.get("question_id", number))), photo, Truth(question.strip(), choices, answer))


# ---------------------------------------------------------------- the data set


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of JSON lines that only ever grows, none if there is no file. Half a line at its end, which a killed
    process left, is cut off."""
    whole = b""
    if path.exists():
        found = path.read_bytes()
        whole = found[:found.rfind(b"\n") + 1]
        if whole != found:
            os.truncate(path, len(whole))
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise SystemExit(f"{path}:{number}: not JSON ({error}): repair or delete the line") from None
    return rows


def write_forms(out: Path, rows: list[dict], order: Sequence[str]) -> list[dict]:
    """train.jsonl in the order of the questions, and the same for LLaMA-Factory; returns the rows in that order."""
    place = {id: n for n, id in enumerate(order)}
    rows = sorted(rows, key=lambda row: place.get(row["id"], len(place)))
    write_text(out / "train.jsonl", "".join(to_json(row) + "\n" for row in rows))
    roles = {"human": "user", "gpt": "assistant"}
    write_text(out / "llamafactory.json", to_json(
        [{"messages": [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]],
          "images": [row["image"]]} for row in rows], indent=1) + "\n")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    write_text(out / "dataset_info.json", to_json({"rr1": {"file_name": "llamafactory.json", "formatting": "sharegpt", "tags": tags,
                                                           "columns": {"messages": "messages", "images": "images"}}}, indent=1) + "\n")
    return rows
