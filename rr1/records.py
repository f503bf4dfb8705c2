"""Records on disk, read as they are. Each is parsed when it is asked for.

Four forms, told apart by their fields, as JSON lines or as one JSON list:

    released       {"id", "image", "conversations": [
                       {"from": "human", "value": "<image>what? 0. cat 1. dog"},
                       {"from": "gpt", "value": "<TYPE>noise(0.20)<TYPE_END>.."}]}
    our own        the same, and beside it "choices", "answer", "degradations", "seed", ..
    LLaMA-Factory  {"messages" or "conversations": [{"role" or "from", "content" or "value"}, ..],
                    "images": [..] or ".."}
    A-OKVQA        {"question_id", "image_id", "split", "question", "choices", "correct_choice_idx",
                    ..}, beside a COCO folder: its picture is {split}2017/{image_id:012}.jpg

Several pictures in one record: "image" (or "images") is a list of paths, and the human turn says
<image> as many times.
"""

from __future__ import annotations

import copy
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from degrade import Degradation
from rr1.chain import IMAGE, Chain, build_question, parse, render

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
MARKS_IN_FRONT = re.compile(rf"(\s*{IMAGE})*")


class DataError(ValueError):
    """A record that cannot be used; the message names the file, the line and the field."""


def image_paths(image: str | list[str]) -> list[str]:
    """A record's `image`, which is one path or a list of several, as a list."""
    return [image] if isinstance(image, str) else image


def open_image(path: str | Path) -> Image.Image:
    """An RGB picture, whole; an error names the file.

    One of more than 89 million pixels is refused before it is decoded.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                size = f"{image.width} x {image.height} pixels"
                raise ValueError(f"{size}, more than {Image.MAX_IMAGE_PIXELS}: make it smaller")
            return image.convert("RGB")
    except Exception as error:  # a broken file can fail in any place of any decoder
        raise DataError(f"{path}: cannot be read as an image ({error})") from error


def read(
    path: str | Path, image_folder: str | Path | None = None, skip_bad: bool = False
) -> Records:
    """Every record of a file, each checked once and parsed when it is asked for.

    `image` paths are relative to `image_folder` (default: the file's own folder), and must stay in
    it. A bad record raises DataError, or with `skip_bad` is left out and told in `.bad`.

    A record is a dict: `id`, `image` (full path; of several pictures a list of them), `question`
    (text, choices included), `response` (the true chain as written), `chain` (parsed), `answer`,
    `choices` (or None), `degradations`, `where` (the file and the line), `number` (of the line, or
    of the item in a list), and whatever else the file held.
    """
    path = Path(path)
    if not path.is_file():
        advice = "Give a file of JSON lines, or leave --data out for the drawn world."
        raise SystemExit(f"--data {path}: no such file. {advice}")
    records = Records(path, Path(image_folder or path.parent))
    quiet = None if os.environ.get("RANK", "0") == "0" else True
    for number, item in enumerate(tqdm(records.items, path.name, delay=2, disable=quiet), start=1):
        if isinstance(item, bytes) and item.isspace():
            continue
        try:
            found = records.checked(number, item)
        except DataError as error:
            if not skip_bad:
                raise
            records.bad.append(str(error))
            continue
        records.numbers.append(number)
        records.ids.append(str(found["id"]))
    if not records:
        first = f" that can be used; the first: {records.bad[0]}" if records.bad else ""
        raise DataError(f"{path}: holds no records{first}")
    return records


class Lines(Sequence):
    """The lines of a file, as bytes. A million of them take 8 MB: where each one starts."""

    def __init__(self, path: Path):
        self.path, self.starts = path, array("q", [0])
        for line in self:
            self.starts.append(self.starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            yield from file

    def __getitem__(self, i: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            return file.readline()


class Records(Sequence):
    """The records of one file, or some of them.

    `ids` are known without parsing; `bad` says what was left out and why.
    """

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder = path, folder
        self.items = Lines(path)
        if self.items[0].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            with named(path):
                self.items = _json(path.read_bytes())
        self.numbers = array("q")  # of each record: its line, or its place in the list, from 1
        self.ids: list[str] = []
        self.bad: list[str] = []

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return self.only(range(len(self))[i])
        number = self.numbers[i]
        record = self.checked(number, self.items[number - 1])
        chain = parse(record["response"])
        known = {"choices": None, "answer": chain.answer, "degradations": chain.degradations}
        return known | record | {"chain": chain}

    def only(self, indices: Sequence[int]) -> Records:
        """These records alone, in this order."""
        part = copy.copy(self)
        part.numbers = array("q", [self.numbers[i] for i in indices])
        part.ids = [self.ids[i] for i in indices]
        return part

    def checked(self, number: int, item: Any) -> dict:
        """A record but for its chain, from a line or an item of a list."""
        where = f"{self.path}{':' if isinstance(item, bytes) else ', item '}{number}"
        with named(where):
            raw = _json(item) if isinstance(item, bytes) else item
            record = _normal(raw, self.folder)
        # one without an id is called by the file's name and line, wherever the file lies
        return {"id": os.path.basename(where)} | record | {"where": where, "number": number}


@contextmanager
def named(where: str | Path) -> Iterator[None]:
    """An error in what was read becomes a DataError that begins with the file and the line."""
    try:
        yield
    except KeyError as error:
        expected = "a record needs image and conversations with a human and a gpt turn"
        raise DataError(f"{where}: field {error} is missing; {expected}") from error
    except (TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{where}: {error}") from error


# ---------------------------------------------------------------- from JSON to a record


def _json(text: bytes) -> Any:
    try:
        return json.loads(text.rstrip())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error}): repair or remove it") from error


def _normal(raw: Any, folder: Path) -> dict:
    """What a file holds of one record under our names; null is taken for absent."""
    if not isinstance(raw, dict):
        raise ValueError(f"holds {str(raw)[:40]!r}; expected an object, {{..}}")
    raw = {key: value for key, value in raw.items() if value is not None}
    is_aokvqa = "question_id" in raw and not raw.keys() & {"conversations", "messages"}
    raw |= _aokvqa(raw) if is_aokvqa else _turns(raw)
    images = raw.get("images") or raw["image"]
    if not images or not isinstance(images, list):
        images = [images]
    paths = [_inside(folder, path) for path in images]
    raw["image"] = paths[0] if len(paths) == 1 else paths
    if "clean_image" in raw:
        raw["clean_image"] = _inside(folder, raw["clean_image"])
    raw["question"] = _without_marks(raw["question"], len(paths))
    if "degradations" in raw:
        raw["degradations"] = _degradations(raw["degradations"])
    return raw


def _inside(folder: Path, path: Any) -> str:
    """The full path of a picture, which may not leave the folder: by `..`, or over a link."""
    if not isinstance(path, str):
        raise ValueError(f"image is {path!r}; expected one path in the image folder, or several")
    root, full = os.path.realpath(folder), os.path.realpath(os.path.join(folder, path))
    if os.path.commonpath([root, full]) != root:
        problem = f"image {path!r} leads to {full}, out of the image folder {root}"
        raise ValueError(f"{problem}: move the picture, or give another --images")
    return os.path.join(folder, path)


def _turns(raw: dict) -> dict:
    """Question and response; a system turn is left out: the chat template brings its own."""
    said = {}
    for turn in raw.get("messages") or raw["conversations"]:
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = ROLES.get(speaker)
        if role is None or role in said or not isinstance(text, (str, int, float)):
            expected = "one human (or user) and one gpt (or assistant) turn, both plain text"
            raise ValueError(f"a turn of {speaker!r} says {str(text)[:40]!r}; expected {expected}")
        said[role] = str(text)
    return {"question": said["human"], "response": said["gpt"]}


def _aokvqa(raw: dict) -> dict:
    """A-OKVQA's fields under our names.

    The photo is clean, its reasoning the first rationale, its answer the right choice's index (the
    test split has none).
    """
    right = raw.get("correct_choice_idx")
    answer = None if right is None else str(right)
    image = raw.get("image") or f"{raw['split']}2017/{int(raw['image_id']):012}.jpg"
    rationales = raw.get("rationales") or [None]
    return {
        "id": raw["question_id"],
        "image": image,
        "clean_image": image,
        "question": build_question(raw["question"], raw["choices"]),
        "question_alone": raw["question"],
        "answer": answer,
        "response": render(Chain(reasoning=rationales[0], answer=answer)),
    }


def _without_marks(question: str, pictures: int) -> str:
    """The question without <image>.

    Only where several pictures are not all in front do the marks stay: they say where each stands.
    """
    marks = question.count(IMAGE)
    if marks != pictures and (marks, pictures) != (0, 1):  # one picture may go unmarked
        paths = f"{pictures} path{'s' * (pictures > 1)}"
        counts = f"the question has {marks} times {IMAGE}, image has {paths}"
        raise ValueError(f"{counts}: write {IMAGE} once for each path")
    if pictures == 1:
        return question.replace(IMAGE, "").strip()
    rest = question[MARKS_IN_FRONT.match(question).end() :]
    return (question if IMAGE in rest else rest).strip()


def _degradations(listed: Any) -> list[Degradation]:
    try:
        return [Degradation(d["type"], float(d["intensity"])) for d in listed]
    except (KeyError, TypeError, ValueError) as error:
        expected = 'a list of {"type": .., "intensity": ..}'
        raise ValueError(f"degradations are {listed!r}; expected {expected}") from error
