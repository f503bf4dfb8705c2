"""The questions that a data set is built from: JSON lines, or A-OKVQA's json.

{"image": "photos/7.jpg", "question": "what is it?", "choices": ["cat", "dog"], "answer": "dog"}
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from rr1.answers import choice_index, plain
from rr1.chain import IMAGE, Chain, build_question
from rr1.files import to_json
from rr1.records import DataError, Records, entry, inside, named

NEEDED = "a question needs image, question and answer, or A-OKVQA's fields"


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

    def fingerprint(self) -> str:
        """A hash of question, choices, answer and photo: another one is another question."""
        digest = hashlib.sha256(to_json(self.truth).encode())
        digest.update(self.photo.read_bytes())
        return digest.hexdigest()[:16]


def read_questions(path: Path, images: str = "", limit: int = 0) -> list[Source]:
    """The questions of a file, photo paths relative to the folder `images` (empty: the file's).

    A question has image, question, choices (absent or null: open), answer (text, letter or index)
    and perhaps id; or A-OKVQA's fields. Photos are looked for of the first `limit` questions (0:
    of all). DataError names the file, the line and the field.
    """
    if not path.is_file():
        expected = "A-OKVQA's json, or JSON lines of image, question, choices, answer"
        raise SystemExit(f"--data {path}: not a file; give {expected}")
    file = Records(path, Path(images or path.parent))
    found: dict[str, Source] = {}
    places: dict[str, str] = {}
    for number, item in enumerate(file.items, start=1):
        if isinstance(item, bytes) and not item.strip():
            continue
        where = file.where(number, item)
        with named(where, NEEDED):
            source = _source(entry(item), file.folder)
            if source.id in found:
                raise ValueError(f"the id {source.id!r} is that of {places[source.id]} too")
            if not limit or len(found) < limit:
                inside(file.folder, str(source.photo.absolute()))
                if not source.photo.is_file():
                    advice = "--images gives the folder that paths are relative to"
                    raise ValueError(f"there is no photo {source.photo}: {advice}")
        found[source.id], places[source.id] = source, where
    if not found:
        raise DataError(f"{path}: holds no questions")
    return list(found.values())


def _source(row: dict, folder: Path) -> Source:
    name = (
        row["image"] if "image" in row else f"{row['split']}2017/{row['image_id']:012}.jpg"
    )
    question, choices = row["question"], row.get("choices")
    texts = [question, *choices] if isinstance(choices, list) else [question]
    usable = all(
        isinstance(text, str) and text.strip() and IMAGE not in text for text in texts
    )
    if not usable or not isinstance(choices, list | None):
        expected = (
            f"a text, and a list of texts or null, none of them empty or with {IMAGE}"
        )
        raise ValueError(
            f"question is {question!r}, choices {choices!r}; expected {expected}"
        )
    truth = Truth(question.strip(), choices or None, _answer(row, choices))
    Chain(answer=truth.answer)  # ValueError for an answer with a tag in it
    # without an id of its own a question is called by what it asks, wherever it stands
    asked = to_json([name, truth.question, truth.choices]).encode()
    digest = hashlib.sha256(asked).hexdigest()
    id = row.get("id", row.get("question_id", f"question-{digest[:12]}"))
    return Source(str(id), folder / name, truth)


def _answer(row: dict, choices: list[str] | None) -> str:
    """The true answer: the index of the choice, or a text."""
    answer, index = row.get("answer"), row.get("correct_choice_idx")
    if answer is None and index is not None and choices:
        if not isinstance(index, int) or index not in range(len(choices)):
            raise ValueError(f"correct_choice_idx is {index!r}, of {len(choices)} choices")
        return str(index)
    if answer is None and row.get("direct_answers"):
        [(answer, _)] = Counter(row["direct_answers"]).most_common(1)
    if not isinstance(answer, (str, int, float)) or not str(answer).strip():
        expected = (
            "answer, correct_choice_idx or direct_answers (A-OKVQA's test part has none)"
        )
        raise ValueError(f"no answer; expected {expected}")
    return str(_which(answer, choices)) if choices else str(answer).strip()


def _which(answer: str | int | float, choices: list[str]) -> int:
    """The index of the choice that is meant: the one of that text, else by letter or index."""
    said = str(answer).strip()
    same = [n for n, choice in enumerate(choices) if choice.strip() == said]
    same = same or [n for n, choice in enumerate(choices) if plain(choice) == plain(said)]
    index = same[0] if same else choice_index(said, choices)
    if index is None:
        raise ValueError(f"answer {answer!r} is none of the choices {choices}")
    if isinstance(answer, int) and choice_index(said, choices) != index:
        advice = f'write "{answer}" for the text, or correct_choice_idx for the index'
        raise ValueError(
            f"answer {answer} is a choice's text and another one's index: {advice}"
        )
    return index
