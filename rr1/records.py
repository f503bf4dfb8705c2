"""Records on disk, read as they are. Each is parsed when it is asked for.

Four forms, told apart by their fields, as JSON lines, as one JSON list, or as a Parquet file or a
Hugging Face data set's folder (`rr1.parquet`):

    released       {"id", "image", "conversations": [
                       {"from": "human", "value": "<image>what? 0. cat 1. dog"},
                       {"from": "gpt", "value": "<TYPE>noise(0.20)<TYPE_END>.."}]}
    our own        the same, and beside it "choices", "answer", "degradations", "seed", ..
    LLaMA-Factory  {"messages" or "conversations": [{"role" or "from", "content" or "value"}, ..],
                    "images": [..] or ".."}; content may be a list of parts, as TRL has it
    A-OKVQA        {"question_id", "image_id", "split", "question", "choices", "correct_choice_idx",
                    ..}, beside a COCO folder: its picture is {split}2017/{image_id:012}.jpg

Several pictures in one record: "image" (or "images") is a list of paths, and the human turn says
<image> as many times. For reinforcement learning no chain is needed: a record without a gpt turn
has "degradations" and, for r_len, "length", the tokens to aim for.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from degrade import Degradation
from rr1.chain import IMAGE, Chain, build_question, parse, render, stated_types
from rr1.parquet import Rows

ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "system": "system",
}
# from which total intensity on damage is called so
LEVELS = {"none": 0.0, "light": 0.0, "medium": 0.75, "strong": 1.5}
MARKS_IN_FRONT = re.compile(rf"(\s*{IMAGE})*")


class DataError(ValueError):
    """A record that cannot be used; the message names the file, the line and the field."""


def image_paths(image: str | list[str]) -> list[str]:
    """A record's `image`, which is one path or a list of several, as a list."""
    return [image] if isinstance(image, str) else image


def open_image(path: str | Path) -> Image.Image:
    """An RGB picture as a person sees it: upright by its EXIF entry, more than 8 bits scaled to 8.

    An error names the file. More than 89 million pixels are refused before they are decoded.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                size = f"{image.width} x {image.height} pixels"
                raise ValueError(
                    f"{size}, more than {Image.MAX_IMAGE_PIXELS}: make it smaller"
                )
            return _to_8_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except Exception as error:  # a broken file can fail in any place of any decoder
        raise DataError(f"{path}: cannot be read as an image ({error})") from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16 bits: the upper 8, as OpenCV takes them. Floats: of their range, 0 to 1, 255 or 65535."""
    if image.mode == "F":
        values = np.asarray(image)
        largest = next(
            (top for top in (1, 255, 65535) if values.max() <= top), values.max()
        )
        return Image.fromarray((values.clip(0) * (255 / largest)).round().astype(np.uint8))
    if image.mode.startswith("I"):  # I;16, I;16B, or 16 bits in an I of 32
        return Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image


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
    if not path.exists():
        advice = "Give a file of JSON lines, or leave the option out for the drawn world."
        raise SystemExit(f"{path}: no such file. {advice}")
    records = Records(path, Path(image_folder or path.parent))
    quiet = None if os.environ.get("RANK", "0") == "0" else True
    items = tqdm(records.items, path.name, delay=2, disable=quiet)
    for number, item in enumerate(items, start=1):
        if isinstance(item, bytes) and not item.strip():
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


class Records(Sequence):
    """The records of one file, or some of them.

    `ids` are known without parsing; `bad` says what was left out and why.
    """

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder = path, folder
        if path.is_dir() or path.suffix == ".parquet":
            self.items = Rows(path, folder)
        else:
            content = path.read_bytes()
            self.items = content.splitlines()
            if content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                with named(path):
                    self.items = _json(content)
        # of each record: its line, or its place in the list, from 1
        self.numbers: list[int] = []
        self.ids: list[str] = []
        self.bad: list[str] = []

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return self.only(range(len(self))[i])
        number = self.numbers[i]
        record = self.checked(number, self.items[number - 1])
        if record["response"] is None:
            chain = Chain(record["degradations"])
        else:
            chain = parse(record["response"])
        known = {
            "choices": None,
            "answer": chain.answer,
            "degradations": chain.degradations,
        }
        return known | record | {"chain": chain}

    def only(self, indices: Sequence[int]) -> Records:
        """These records alone, in this order."""
        part = copy.copy(self)
        part.numbers = [self.numbers[i] for i in indices]
        part.ids = [self.ids[i] for i in indices]
        return part

    def where(self, number: int, item: Any) -> str:
        return f"{self.path}{':' if isinstance(item, bytes) else ', item '}{number}"

    def checked(self, number: int, item: Any) -> dict:
        """A record but for its chain, from a line or an item of a list."""
        where = self.where(number, item)
        with named(where):
            record = _normal(entry(item), self.folder)
        # one without an id is called by the file's name and line, wherever the file lies
        return {"id": os.path.basename(where)} | record | {"where": where, "number": number}


NEEDED = "a record needs image and conversations with a human and a gpt turn"


@contextmanager
def named(where: str | Path, needed: str = NEEDED) -> Iterator[None]:
    """An error in what was read becomes a DataError that begins with the file and the line."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{where}: field {error} is missing; {needed}") from error
    except (TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{where}: {error}") from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """For a script's `main`: a DataError is one line on stderr and exit status 2.

    Under torchrun it is told once: rank 0 ends first, and torchrun then ends the others.
    """
    try:
        yield
    except DataError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)
        print(" ".join(str(error).split()), file=sys.stderr, flush=True)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            sys.stdout.flush()
            os._exit(2)  # leaving in good order, it would wait for the others
        raise SystemExit(2) from None


def level(total: float) -> str:
    """The strength of damage: none, light, medium or strong, by its total intensity."""
    for name in ("strong", "medium"):
        if total >= LEVELS[name]:
            return name
    return "light" if total else "none"


def check_truth(record: dict, rewards: Sequence[str]) -> None:
    """DataError where rewards of these names need the true damage, or the true chain's length, and
    the record does not hold it, or holds two statements of it that disagree."""
    damage = not {"deg", "deg_pairwise", "deg_released"}.isdisjoint(rewards)
    known, response, chain = record["degradations"], record["response"], record["chain"]
    stated = stated_types(response) if response else None
    length = record.get("length", 1 if chain.reasoning or chain.conclusion else None)
    with named(record["where"]):
        if damage and response and stated is None and not known:
            expected = '<TYPE>noise(0.20)<TYPE_END> in the true chain, or "degradations"'
            raise ValueError(
                f"what damaged the picture cannot be read; expected {expected}"
            )
        if damage and not all(0 <= s <= 1 for _, s in known):
            raise ValueError(f"the true damage is {known}; expected intensities in [0, 1]")
        if damage and stated is not None and not _agree(stated, known):
            raise ValueError(
                f'the true chain says {stated}, "degradations" {known}: correct one'
            )
        if "len" in rewards and not (isinstance(length, int) and length >= 1):
            expected = 'a true chain, or "length", its tokens by Eq. 7'
            raise ValueError(f"the length to aim for is {length}; expected {expected}")


def _agree(a, b) -> bool:
    """Whether two lists of degradations are the same, up to their two decimals."""
    pairs = zip(sorted(a), sorted(b))
    return len(a) == len(b) and all(
        x == y and abs(s - t) < 0.015 for (x, s), (y, t) in pairs
    )


# ---------------------------------------------------------------- from JSON to a record


def _json(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error}): repair or remove it") from error


def entry(item: Any) -> dict:
    """A line, or an item of a list, as an object; ValueError if it is none."""
    raw = _json(item) if isinstance(item, bytes) else item
    if not isinstance(raw, dict):
        raise ValueError(f"holds {str(raw)[:40]!r}; expected an object, {{..}}")
    return raw


def _normal(raw: dict, folder: Path) -> dict:
    """What a file holds of one record under our names; null is taken for absent."""
    raw = {key: value for key, value in raw.items() if value is not None}
    is_aokvqa = "question_id" in raw and not raw.keys() & {"conversations", "messages"}
    raw |= _aokvqa(raw) if is_aokvqa else _turns(raw)
    images = raw.get("images") or raw["image"]
    if not images or not isinstance(images, list):
        images = [images]
    paths = [inside(folder, path) for path in images]
    raw["image"] = paths[0] if len(paths) == 1 else paths
    if "clean_image" in raw:
        raw["clean_image"] = inside(folder, raw["clean_image"])
    if not isinstance(raw.get("choices", []), list):
        raise ValueError(f"choices is {raw['choices']!r}; expected a list of texts")
    raw["question"] = _without_marks(raw["question"], len(paths))
    if "_pad|>" in raw["question"] + (raw["response"] or ""):
        raise ValueError(
            "a turn spells a token such as <|image_pad|>, which stands for a picture"
        )
    if "degradations" in raw:
        raw["degradations"] = _degradations(raw["degradations"])
    return raw


real_folder = lru_cache(os.path.realpath)


def inside(folder: Path, path: Any) -> str:
    """The full path of a picture, which may not leave the folder: by `..`, or over a link."""
    if not isinstance(path, str):
        raise ValueError(
            f"image is {path!r}; expected one path in the image folder, or several"
        )
    root, full = real_folder(folder), os.path.realpath(os.path.join(folder, path))
    if os.path.commonpath([root, full]) != root:
        problem = f"image {path!r} leads to {full}, out of the image folder {root}"
        raise ValueError(f"{problem}: move the picture, or give another --images")
    return os.path.join(folder, path)


def _turns(raw: dict) -> dict:
    """Question and response of a conversation, and the pictures among its parts, if any.

    The last turn is asked; what was said before stands in front of it. A system turn is left out:
    the chat template brings its own. Without a gpt turn the damage must be known.
    """
    said, images = [], []
    for turn in raw.get("messages") or raw["conversations"]:
        speaker = turn.get("from", turn.get("role"))
        content = turn.get("value", turn.get("content"))
        role = ROLES.get(speaker)
        text = _text(content, images)
        if role is None or text is None or said and said[-1][0] == role:
            expected = "human (or user) and gpt (or assistant) in turn, each saying text"
            raise ValueError(
                f"a turn of {speaker!r} says {str(content)[:40]!r}; expected {expected}"
            )
        if role != "system":
            said.append((role, text))
    response = said.pop()[1] if said and said[-1][0] == "gpt" else None
    if not said:
        raise KeyError("human")
    if response is None and "degradations" not in raw:
        raise KeyError("gpt")
    found = {"question": "\n".join(text for _, text in said), "response": response}
    return found | ({"image": images} if images else {})


def _text(content: Any, images: list[str]) -> str | None:
    """What a turn says: text, a number, or a list of parts; their pictures go to `images`."""
    if isinstance(content, (str, int, float)):
        return str(content)
    if not isinstance(content, list):
        return None
    text = ""
    for part in content:
        text += part["text"] if part["type"] == "text" else IMAGE
        if part.get("image"):
            images.append(part["image"])
    return text


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
    """By the paper's names, as a Chain has them."""
    try:
        found = Chain([(d["type"], d["intensity"]) for d in listed]).degradations
        if not all(0 <= s <= 1 for _, s in found):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        expected = 'a list of {"type": .., "intensity": a number in [0, 1]}'
        raise ValueError(f"degradations are {listed!r}; expected {expected}") from error
    return found
