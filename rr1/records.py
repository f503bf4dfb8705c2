"""Records on disk, read as they are. A million of them are a few offsets and ids: a record is parsed when it is asked for.

Four forms, told apart by their fields, as JSON lines or as one JSON list:

    released       {"id", "image", "conversations": [{"from": "human", "value": "<image>what? 0. cat 1. dog"},
                                                     {"from": "gpt", "value": "<TYPE>noise(0.20)<TYPE_END>.."}]}
    our own        the same, and beside it "choices", "answer", "degradations", "seed", "clean_image", ..
    LLaMA-Factory  {"messages" or "conversations": [{"role" or "from": .., "content" or "value": ..}], "images": [..] or ".."}
    A-OKVQA        {"question_id", "image_id", "split", "question", "choices", "correct_choice_idx", ..}, beside a COCO folder:
                   its picture is {split}2017/{image_id:012}.jpg

Several pictures in one record: "image" (or "images") is a list of paths, and the human turn says <image> as many times.
"""
from __future__ import annotations

import json
import os
import re
from array import array
from pathlib import Path
from typing import Any, BinaryIO, Iterator, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from degrade import Degradation
from rr1.chain import IMAGE, Chain, build_question, parse, render

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
IN_FRONT = re.compile(rf"(\s*{IMAGE})*")
CHUNK, LONGEST = 2**20, 2**24        # bytes of a JSON list read at a time, and of its longest item
GAP = re.compile(r"[ \t\r\n,]*")


class DataError(ValueError):
    """A record that cannot be used; the message names the file, the line and the field."""


def image_paths(image: str | list[str]) -> list[str]:
    """A record's `image`, which is one path or a list of several, as a list."""
    return [image] if isinstance(image, str) else image


def open_image(path: str | Path) -> Image.Image:
    """An RGB picture, whole; an error names the file. One of more than 89 million pixels is refused before it is decoded."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}: make it smaller")
            return image.convert("RGB")
    except Exception as error:                          # a broken file can fail in any place of any decoder
        raise DataError(f"{path}: cannot be read as an image ({error})") from error


def read(path: str | Path, image_folder: str | Path | None = None, skip_bad: bool = False) -> Records:
    """Every record of a file, each checked once and parsed when it is asked for. `image` paths are relative to `image_folder`
    (default: the file's own folder), and must stay in it.

    A record is a dict: `id`, `image` (full path; of several pictures a list of them), `question` (text, choices included), `response`
    (the true chain as written), `chain` (parsed), `answer`, `choices` (or None), `degradations`, `where` (file:line), `number` (of the
    line, or of the item in a list), and whatever else the file held. A bad one raises DataError, or with `skip_bad` is left out and told
    in `.bad`.
    """
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"--data {path}: no such file. Give a file of JSON lines, or leave --data out for the drawn world.")
    records = Records(path, Path(image_folder) if image_folder else path.parent)
    places, quiet = array("q"), None if os.environ.get("RANK", "0") == "0" else True
    with open(path, "rb") as file, tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, delay=2, disable=quiet) as bar:
        records.listed = file.read(CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        file.seek(0)
        for number, line, start, text in (_items if records.listed else _lines)(file, path):
            where = records.where_of(number, line)
            try:
                raw = _normal(_json(text, where), where)
                _inside(records.folder, raw, where)
                places.extend((start, start + len(text), number, line))
                records.ids.append(str(raw.get("id", _own_id(where))))
            except DataError as error:
                if not skip_bad:
                    raise
                records.bad.append(str(error))
            bar.update(start + len(text) - bar.n)
    if not places:
        raise DataError(f"{path}: holds no records" + (f" that can be used; the first: {records.bad[0]}" if records.bad else ""))
    records.places = np.array(places).reshape(-1, 4)
    return records


class Records(Sequence):
    """The records of one file, or some of them. `ids` are known without parsing; `bad` says what was left out and why."""

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder, self.listed = path, folder, False
        self.places: np.ndarray = np.empty((0, 4), np.int64)     # a row a record: first byte, last byte + 1, number, line
        self.ids: list[str] = []
        self.bad: list[str] = []

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return self.only(range(len(self))[i])
        start, end, number, line = self.places[i].tolist()
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(end - start)
        where = self.where_of(number, line)
        return _record(_normal(_json(text, where), where), where, self.folder, number)

    def only(self, indices: Sequence[int]) -> Records:
        """These records alone, in this order."""
        part = Records(self.path, self.folder)
        part.listed, part.bad = self.listed, self.bad
        part.places, part.ids = self.places[np.asarray(indices, np.int64)], [self.ids[i] for i in indices]
        return part

    def where(self, i: int) -> str:
        return self.where_of(*self.places[i, 2:].tolist())

    def where_of(self, number: int, line: int) -> str:
        return f"{self.path}:{line}" + (f" (item {number})" if self.listed else "")


# ---------------------------------------------------------------- from bytes to JSON

def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """(number, line, first byte, text) of every line that is not blank."""
    start = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, number, start, line
        start += len(line)


def _items(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """(number, line, first byte, text) of every item of one JSON list, read piece by piece.

    Bytes are taken for characters (latin-1), so that a place in the text is a place in the file.
    """
    decoder, text = json.JSONDecoder(), file.read(CHUNK).decode("latin-1")
    at, base, line, counted, number = text.index("[") + 1, 0, 1, 0, 0   # base: place of text[0] in the file
    while True:
        at = GAP.match(text, at).end()
        line, counted = line + text.count("\n", counted, at), at
        if text.startswith("]", at):
            return
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:                    # broken, or the rest of it is not here yet
            piece = file.read(CHUNK)
            if not piece or len(text) - at > LONGEST:
                raise DataError(f"{path}:{line} (item {number + 1}): not JSON ({error}), and what follows cannot be found: repair it") from error
            text, base, at, counted = text[at:] + piece.decode("latin-1"), base + at, 0, 0
            continue
        number += 1
        yield number, line, base + at, text[at:end].encode("latin-1")
        at = end


def _json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}): repair or remove the line") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON in UTF-8 ({error}): repair or remove the line") from error


# ---------------------------------------------------------------- from JSON to a record

def _normal(raw: Any, where: str) -> dict:
    """What the file holds of one record, brought to our names: image, clean_image, question, response; all of it checked."""
    if not isinstance(raw, dict):
        raise DataError(f"{where}: holds {str(raw)[:40]!r}; expected an object, {{..}}")
    try:
        raw = _aokvqa(raw) if "question_id" in raw and not raw.keys() & {"conversations", "messages"} else raw | _turns(raw)
        image = raw.get("images") or raw["image"]
    except KeyError as error:
        raise DataError(f"{where}: field {error} is missing; a record needs image and conversations with a human and a gpt turn") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{where}: {error}") from error
    raw["image"] = image[0] if isinstance(image, list) and len(image) == 1 else image
    paths = raw["image"] if isinstance(raw["image"], list) else [raw["image"]]
    if not paths or not all(isinstance(path, str) for path in (*paths, raw.get("clean_image", ""))):
        raise DataError(f"{where}: image is {image!r}, clean_image {raw.get('clean_image')!r}; expected one path each, of an image also a list "
                        "of them, relative to the image folder")
    raw["question"] = _without_marks(raw["question"], len(paths), where)
    try:
        raw.get("degradations") is None or [Degradation(d["type"], float(d["intensity"])) for d in raw["degradations"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f'{where}: degradations are {raw["degradations"]!r}; expected a list of {{"type": .., "intensity": ..}}') from error
    return raw


def _turns(raw: dict) -> dict:
    """Question and response of a conversation; a system turn is left out, since the chat template brings its own."""
    said = {}
    for turn in raw.get("messages") or raw["conversations"]:
        speaker, text = turn["from"] if "from" in turn else turn["role"], turn["value"] if "value" in turn else turn["content"]
        if speaker not in ROLES or ROLES[speaker] in said or not isinstance(text, (str, int, float)):
            raise ValueError(f"a turn of {speaker!r} says {str(text)[:40]!r}; expected one human (or user) and one gpt (or assistant) turn, "
                             "both plain text")
        said[ROLES[speaker]] = str(text)
    return {"question": said["human"], "response": said["gpt"]}


def _without_marks(question: str, pictures: int, where: str) -> str:
    """The question without <image>. Only where several pictures are not all in front do the marks stay: they say where each one stands."""
    marks = question.count(IMAGE)
    if marks != pictures and (marks, pictures) != (0, 1):                # one picture may go unmarked
        raise DataError(f"{where}: the question has {marks} times {IMAGE}, image has {pictures} path{'s' * (pictures > 1)}: "
                        f"write {IMAGE} once for each path")
    rest = question.replace(IMAGE, "") if pictures == 1 else question[IN_FRONT.match(question).end():]
    return (question if IMAGE in rest else rest).strip()


def _aokvqa(raw: dict) -> dict:
    """A-OKVQA's fields under our names. The photo is clean, the first rationale is its reasoning, the answer the right one's index."""
    right = raw.get("correct_choice_idx")                                # the test split has none
    image = raw.get("image") or f"{raw['split']}2017/{int(raw['image_id']):012}.jpg"
    answer = None if right is None else str(right)
    chain = Chain(reasoning=next(iter(raw.get("rationales") or ()), None), answer=answer)
    return raw | {"id": raw["question_id"], "image": image, "clean_image": image, "question": build_question(raw["question"], raw["choices"]),
                  "question_alone": raw["question"], "answer": answer, "response": render(chain)}


def _record(raw: dict, where: str, folder: Path, number: int) -> dict:
    chain = parse(raw["response"])
    known = raw.get("degradations")
    known = chain.degradations if known is None else [Degradation(d["type"], float(d["intensity"])) for d in known]
    full = lambda paths: [full(path) for path in paths] if isinstance(paths, list) else os.path.join(folder, paths)
    paths = {key: full(raw[key]) for key in ("image", "clean_image") if key in raw}
    _inside(folder, raw, where, os.path.realpath)
    return {"id": _own_id(where), "choices": None, "answer": chain.answer, **raw, **paths, "where": where, "number": number, "chain": chain,
            "degradations": known}


def _own_id(where: str) -> str:
    """Of a record without one: the file's name and line, wherever the file lies."""
    return os.path.basename(where)


def _inside(folder: Path, raw: dict, where: str, resolve=os.path.normpath) -> None:
    """Refuse a path that leads out of the image folder, by `..`, from the root, or (with os.path.realpath) over a link."""
    for path in (*image_paths(raw["image"]), raw.get("clean_image")):
        if path is None or resolve is os.path.normpath and ".." not in path and not os.path.isabs(path):
            continue                                                     # most paths, a million times: nothing to resolve
        try:
            root, full = (resolve(os.path.abspath(p)) for p in (folder, os.path.join(folder, path)))
            if os.path.commonpath([root, full]) == root:
                continue
            problem = f"leads to {full}, out of the image folder {root}"
        except ValueError as error:
            problem = str(error)
        raise DataError(f"{where}: image {path!r} {problem}: move the picture, or give another --images")
