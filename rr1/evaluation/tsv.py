"""VLMEvalKit's TSV: reading one, and damaged copies of it that other tools read.

Columns index, image (base64, a printed list of several, or another row's index) or image_path,
question, hint, A, B, .., answer, category, strength; of a damaged copy degradation, intensity,
damage_seed.
"""

import ast
import base64
import binascii
import csv
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from string import ascii_uppercase
from tempfile import TemporaryDirectory
from zlib import crc32

import numpy as np
from PIL import Image
from tqdm import tqdm

from degrade import Degradation, degrade, sample_degradations
from rr1 import files
from rr1.chain import build_question
from rr1.records import DataError, inside, named, open_image

STRENGTHS = {
    "1": "low",
    "2": "mid",
    "3": "high",
    "low": "low",
    "mid": "mid",
    "high": "high",
}
LONGEST_INDEX = 64  # an image cell of at most so many characters is another row's index
# MMBench: index + k CIRCLE is the same question with its options turned by k
CIRCLE = 1_000_000
# what pandas, and so VLMEvalKit, takes for an absent cell
ABSENT = {"#N/A N/A", *"#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA>".split()}
ABSENT |= set("N/A NA NULL NaN None n/a nan null".split())
REQUEST = "Please select the correct answer from the options above."


def choice_prompt(question: str, options: dict, hint: str) -> str:
    """The question of the multiple-choice family: hint, question, options one a line, a request."""
    lines = [f"Question: {question}", "Options:"]
    if hint:
        lines.insert(0, f"Hint: {hint}")
    lines += [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join([*lines, REQUEST])


# ---------------------------------------------------------------- reading


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(file:line, {column: text}) of a TSV, one row at a time; an absent cell is ""."""
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        try:
            for row in tqdm(reader, path.name, unit=" rows", delay=2, disable=None):
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    n = len(reader.fieldnames)
                    raise DataError(
                        f"{where}: has not the {n} columns of the first line: cut off?"
                    )
                for name, text in row.items():
                    if text in ABSENT:
                        row[name] = ""
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            line = reader.line_num + 1
            raise DataError(f"{path}:{line}: not a TSV in UTF-8 ({error})") from error


def read_tsv(path: Path, images: Path, cache: Path, bad: list[str] | None) -> list[dict]:
    """The questions; pictures that come inside the file are put into the folder `cache`.

    A row that cannot be used raises DataError, or is left out and told in `bad`.
    """
    lenders = {}  # index -> the question that has pictures of its own
    questions = []
    for where, row in rows_of(path):
        with left_out(bad, where):
            number = where.rpartition(":")[2]
            question = read_question(row) | {"where": where, "number": number}
            cells = as_list(row.get("image", ""))
            if cells and len(cells[0]) <= LONGEST_INDEX:
                question["image"] = cells[0]
            else:
                lend(question, find_pictures(row, cells, images, cache), lenders)
            questions.append(question)
    usable = []
    for question in questions:
        with left_out(bad, question["where"]):
            borrow(question, lenders)
            if "degradations" not in question and is_damaged_set(path, question):
                question["degradations"] = None
            usable.append(question)
    mark_circles(usable)
    return usable


def lend(question: dict, found: list[str], lenders: dict) -> None:
    """Give the question its pictures, and let others find them."""
    question["image"] = found[0] if len(found) == 1 else found
    lender = lenders.setdefault(question["id"], question)
    if lender["image"] != question["image"]:
        raise ValueError(f"index {question['id']} stands there twice, with other pictures")


def borrow(question: dict, lenders: dict) -> None:
    """The picture of another row's index, and what is known of its damage."""
    index = question["image"]
    if isinstance(index, str) and index in lenders:
        names = lenders[index].keys() & {"image", "degradations", "seed"}
        question |= {name: lenders[index][name] for name in names}
    elif question["id"] not in lenders:
        raise ValueError(f"image is {index!r}, and no row of that index has a picture")


def mark_circles(questions: list[dict]) -> None:
    """`circle`: the question that is asked again, its options turned; 1000007 and 2000007 are 7."""
    indices = {question["id"] for question in questions}
    for question in questions:
        if question["id"].isdigit():
            base = int(question["id"]) % CIRCLE
            if {str(base), str(base + CIRCLE)} <= indices:
                question["circle"] = str(base)


def is_damaged_set(path: Path, question: dict) -> bool:
    """Whether pictures come damaged, nobody knows how: R-Bench's, but for its references."""
    name = path.stem.lower()
    return not name.endswith("-ref") and (
        "strength" in question or name.startswith("r-bench")
    )


def read_question(row: dict) -> dict:
    """What a row asks."""
    for name in ("index", "question"):
        if name not in row:
            raise ValueError(f"no column {name}; there are {', '.join(row)}")
    text, hint, answer = row["question"], row.get("hint", ""), row.get("answer", "").strip()
    found = {"id": row["index"], "form": "open", "question": text, "answer": answer or None}
    options = {letter: row[letter] for letter in ascii_uppercase if row.get(letter)}
    if options:
        found |= choice_question(text, options, answer, hint)
    if row.get("category"):
        found["category"] = row["category"]
    if row.get("strength") in STRENGTHS:
        found["strength"] = STRENGTHS[row["strength"]]
    if row.get("degradation"):
        found["degradations"] = [Degradation(row["degradation"], float(row["intensity"]))]
        found["seed"] = row.get("damage_seed")
    return found


def choice_question(text: str, options: dict, answer: str, hint: str = "") -> dict:
    """A choice in both ways in which it may be asked. `answer`: a letter or a text, "": unknown."""
    indexed = build_question(f"{hint}\n{text}", list(options.values()))
    return {
        "form": "choice",
        "question": choice_prompt(text, options, hint),
        "indexed": indexed,
        "choices": list(options.values()),
        "letters": "".join(options),
        "answer": letter_of(answer, options) or None,
    }


def letter_of(answer: str, options: dict) -> str:
    """The option that is right, given by its letter or its text; as it came if there is none."""
    if answer in options:
        return answer
    same = [letter for letter, text in options.items() if text.strip() == answer]
    same = same or [letter for letter in options if letter == answer.upper()]
    return same[0] if len(same) == 1 else answer


def as_list(cell: str) -> list[str]:
    """The items of a cell, which may be a printed list, or one item, or nothing."""
    cell = cell.strip()
    if not cell.startswith("["):
        return [cell] if cell else []
    try:
        return [str(item) for item in ast.literal_eval(cell)]
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f"{cell[:40]!r} is no printed list") from None


def find_pictures(row: dict, cells: list[str], images: Path, cache: Path) -> list[str]:
    """The files of a row's own pictures, which came as base64 in `cells` or lie in `images`."""
    found = [str(keep_picture(cell, cache)) for cell in cells]
    found = found or [inside(images, path) for path in as_list(row.get("image_path", ""))]
    if not found:
        raise ValueError("no image")
    return found


def decode_picture(cell: str) -> tuple[str, bytes]:
    """(a name that follows from the bytes, the file's bytes)."""
    try:
        # a data: URI's head ends in a comma
        content = base64.b64decode(cell.rpartition(",")[2])
    except binascii.Error as error:
        raise ValueError(f"image is not base64 ({error})") from error
    ending = ".png" if content.startswith(b"\x89PNG") else ".jpg"
    return hashlib.sha256(content).hexdigest()[:20] + ending, content


def keep_picture(cell: str, cache: Path) -> Path:
    """Put a picture that came as base64 into the folder `cache`, once, if it can be opened."""
    name, content = decode_picture(cell)
    path = cache / name
    if not path.exists():
        open_bytes(content)
        cache.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, content)
    return path


def open_bytes(content: bytes) -> Image.Image:
    try:
        return open_image(io.BytesIO(content))
    except DataError as error:
        raise ValueError(f"image cannot be read as an image ({error.__cause__})") from error


@contextmanager
def left_out(bad: list[str] | None, where: str) -> Iterator[None]:
    """An error inside is a DataError with file and line; a list `bad` takes it and goes on."""
    try:
        with named(where):
            yield
    except DataError as error:
        if bad is None:
            raise
        bad.append(str(error))


# ---------------------------------------------------------------- damaged copies


def draw_damage(name: str, seed: int) -> tuple[str, int]:
    """(type, seed) of the damage done to the picture of this file name: one type, stage first."""
    rng = np.random.default_rng([seed, crc32(name.encode())])
    [(type, _)] = sample_degradations(rng, 1, 1)
    return type, int(rng.integers(2**31))


def damage_tsv(
    source: Path,
    target: Path,
    levels: list[float],
    seed: int = 0,
    bad: list[str] | None = None,
) -> list[Path]:
    """Write a copy of a TSV for each level, whole or not at all; returns the files.

    Pictures are damaged, on all cores, and in PNG, so nothing else is lost (several times larger),
    with the columns degradation, intensity and damage_seed. One level: `target`; several:
    target_25.tsv .. A row that borrows another's picture still does. A row that cannot be used
    raises DataError, or is left out and told in `bad`.
    """
    names = [target]
    if len(levels) > 1:
        percents = [f"{100 * s:g}".replace(".", "p") for s in levels]  # 0.125: 12p5
        names = [target.with_name(f"{target.stem}_{text}.tsv") for text in percents]
    if len(set(names)) < len(levels) or source.resolve() in [
        name.resolve() for name in names
    ]:
        raise SystemExit(
            f"{target}: the levels {levels} need files of their own, not {source}"
        )
    with TemporaryDirectory(dir=target.parent) as folder, ThreadPool() as pool:
        paths = [Path(folder, name.name) for name in names]
        damaged = pool.imap(partial(damage_row, levels, seed, bad), rows_of(source))
        for rows in filter(None, damaged):
            for path, row in zip(paths, rows):
                append_row(path, row)
        if not paths[0].exists():
            raise DataError(f"{source}: holds no row that can be used")
        for path, name in zip(paths, names):
            os.replace(path, name)
    return names


def append_row(path: Path, row: dict) -> None:
    with open(path, "a", encoding="utf-8", newline="") as sheet:
        writer = csv.DictWriter(sheet, row, delimiter="\t", lineterminator="\n")
        if sheet.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def damage_row(
    levels: list[float], seed: int, bad: list[str] | None, found: tuple[str, dict]
) -> list[dict] | None:
    """The row at each level; a borrowed picture stays borrowed."""
    where, row = found
    columns = dict.fromkeys(("degradation", "intensity", "damage_seed"))
    with left_out(bad, where):
        cells = as_list(row.get("image", ""))
        if not cells:
            raise ValueError("no image inside the file, so none to damage")
        if "degradation" in row:
            raise ValueError("a column degradation: this is a damaged copy already")
        if len(cells[0]) <= LONGEST_INDEX:
            return [row | columns] * len(levels)
        pictures = [decode_picture(cell) for cell in cells]
        type, damage_seed = draw_damage(pictures[0][0], seed)
        images = [np.asarray(open_bytes(content)) for _, content in pictures]
        damaged = []
        for s in levels:
            hurt = [
                encode_png(degrade(image, [(type, s)], damage_seed)) for image in images
            ]
            columns = {
                "degradation": type,
                "intensity": f"{s:g}",
                "damage_seed": damage_seed,
            }
            image = hurt[0] if len(hurt) == 1 else str(hurt)
            damaged.append(row | columns | {"image": image})
        return damaged


def encode_png(image: np.ndarray) -> str:
    """(H, W, 3) -> base64."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
