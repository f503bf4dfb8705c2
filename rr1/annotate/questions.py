"""The questions that a data set is built from: JSON lines, or A-OKVQA's json.

{"image": "photos/7.jpg", "question": "what is it?", "choices": ["cat", "dog"], "answer": "dog"}
"""

import json
from collections import Counter
from pathlib import Path
from typing import Iterator, NamedTuple

from rr1.answers import choice_index
from rr1.chain import Chain, build_question


class Truth(NamedTuple):
    """Y_GT: the question, its choices (None if open), its true answer: an index, or the text."""

    question: str
    choices: list[str] | None
    answer: str

    @property
    def answer_text(self) -> str:
        return self.choices[int(self.answer)] if self.choices else self.answer

    def __str__(self) -> str:
        number = f"{self.answer}. " if self.choices else ""
        asked = build_question(self.question, self.choices)
        return f"{asked}\nTrue answer: {number}{self.answer_text}"


class Source(NamedTuple):
    """One question: its id, its photo, what is asked."""

    id: str
    photo: Path
    truth: Truth


def read_questions(path: Path, images: str = "") -> list[Source]:
    """The questions of a file, photo paths relative to the folder `images` (empty: the file's).

    A question has image, question, choices (absent or null: open), answer (index, letter or text)
    and perhaps id; or A-OKVQA's fields. SystemExit names the file, the line and the field.
    """
    if not path.is_file():
        expected = "A-OKVQA's json, or JSON lines of image, question, choices, answer"
        raise SystemExit(f"--data {path}: not a file; give {expected}")
    folder = Path(images) if images else path.parent
    found: dict[str, Source] = {}
    places: dict[str, str] = {}
    for where, row in _rows(path):
        try:
            source = _source(row, folder, f"{path.stem}-{len(found) + 1:06d}")
        except ValueError as error:
            raise SystemExit(f"{where}: {error}") from None
        except (KeyError, TypeError) as error:
            raise SystemExit(f"{where}: field {error} is missing or of the wrong kind") from None
        if source.id in found:
            raise SystemExit(f"{where}: the id {source.id!r} is that of {places[source.id]} too")
        found[source.id], places[source.id] = source, where
    if not found:
        raise SystemExit(f"{path}: holds no questions")
    return list(found.values())


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(where it stands, entry) of each question."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        for number, row in enumerate(_json(text, str(path)), start=1):
            yield f"{path}, entry {number}", row
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield f"{path}:{number}", _json(line, f"{path}:{number}")


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise SystemExit(f"{where}: not JSON ({error})") from None


def _source(row: dict, folder: Path, default_id: str) -> Source:
    photo = _photo(row, folder)
    question, choices = row["question"], row.get("choices") or None
    texts = [question, *(choices or [])]
    if not all(isinstance(text, str) for text in texts):
        expected = "a text, and a list of texts or null"
        raise ValueError(f"question is {question!r}, choices {choices!r}; expected {expected}")
    answer = _answer(row)
    if choices:
        index = choice_index(answer, choices)
        if index is None:
            raise ValueError(f"answer {answer!r} is none of the choices {choices}")
        answer = str(index)
    Chain(answer=answer)  # ValueError for an answer with a tag in it
    id = row.get("id", row.get("question_id", default_id))
    return Source(str(id), photo, Truth(question.strip(), choices, answer))


def _photo(row: dict, folder: Path) -> Path:
    name = row["image"] if "image" in row else f"{row['split']}2017/{row['image_id']:012}.jpg"
    photo = folder / name
    if not photo.is_file():
        advice = "--images gives the folder that paths are relative to"
        raise ValueError(f"there is no photo {photo}: {advice}")
    if not photo.resolve().is_relative_to(folder.resolve()):
        advice = "move the picture, or give another --images"
        raise ValueError(f"{photo} leads to {photo.resolve()}, out of the image folder: {advice}")
    return photo


def _answer(row: dict) -> str:
    for name in ("answer", "correct_choice_idx"):
        if name in row:
            return str(row[name])
    if not row.get("direct_answers"):
        expected = "answer, correct_choice_idx or direct_answers (A-OKVQA's test part has none)"
        raise ValueError(f"no answer; expected {expected}")
    [(answer, _)] = Counter(row["direct_answers"]).most_common(1)
    return answer
