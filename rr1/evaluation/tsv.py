"""VLMEvalKit's TSV: reading one, and damaged copies of it that other tools read.

Columns index, image (base64, or another row's index), question, hint, A, B, .., answer, category.
"""

import ast
import base64
import binascii
import csv
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from string import ascii_uppercase
from zlib import crc32

import numpy as np
from PIL import Image
from tqdm import tqdm

from degrade import degrade, sample_degradations
from rr1 import files
from rr1.records import DataError, open_image

STRENGTHS = {"1": "low", "2": "mid", "3": "high", "low": "low", "mid": "mid", "high": "high"}
LONGEST_INDEX = 64  # an image cell of at most so many characters is another row's index
REQUEST = "Please select the correct answer from the options above."


def choice_prompt(question: str, options: dict[str, str], hint: str = "") -> str:
    """The question of the multiple-choice family: hint, question, options one a line, a request."""
    lines = [f"Question: {question}", "Options:"]
    if hint:
        lines.insert(0, f"Hint: {hint}")
    lines += [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join([*lines, REQUEST])


# ---------------------------------------------------------------- reading


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(file:line, {column: text}) of a TSV, one row at a time; a cell absent or NaN is ""."""
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        try:
            for row in tqdm(reader, path.name, unit=" rows", delay=2, disable=None):
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    n = len(reader.fieldnames)
                    raise DataError(f"{where}: has not the {n} columns of the first line: cut off?")
                for name, text in row.items():
                    if text.strip().lower() == "nan":
                        row[name] = ""
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            line = reader.line_num + 1
            raise DataError(f"{path}:{line}: not a TSV in UTF-8 ({error})") from error


def read_tsv(path: Path, images: Path, cache: Path) -> Iterator[dict]:
    """The questions; pictures that come inside the file are put into the folder `cache`."""
    questions, pictures = [], {}  # index -> the file of its picture
    for where, row in rows_of(path):
        for name in ("index", "question"):
            if name not in row:
                raise DataError(f"{where}: no column {name}; there are {', '.join(row)}")
        question = read_question(row, where)
        cell = picture_cell(row, where)
        if len(cell) > LONGEST_INDEX:
            pictures[row["index"]] = str(keep_picture(cell, cache, where))
        elif cell:
            question["image"] = cell
        elif row.get("image_path"):
            pictures[row["index"]] = os.path.join(images, row["image_path"])
        else:
            raise DataError(f"{where}: no image")
        question["damaged"] = "strength" in row or path.stem.startswith("R-Bench")
        questions.append(question)
    for question in questions:
        index = question["image"]
        if index not in pictures:
            what = f"{question['where']}: image is {index!r}"
            raise DataError(f"{what}, and there is no row of that index with a picture of its own")
        yield question | {"image": pictures[index]}


def read_question(row: dict[str, str], where: str) -> dict:
    """What a row asks; its image is still the index of the row whose picture it is."""
    index, text = row["index"], row["question"]
    found = {"where": where, "id": index, "image": index, "form": "open", "question": text}
    found["answer"] = row.get("answer", "").strip() or None
    options = {letter: row[letter] for letter in ascii_uppercase if row.get(letter)}
    if options:
        found["form"] = "choice"
        found["question"] = choice_prompt(text, options, row.get("hint", ""))
        found["choices"], found["letters"] = list(options.values()), "".join(options)
        if found["answer"] is not None:
            found["answer"] = letter_of(found["answer"], options, where)
    if row.get("category"):
        found["category"] = row["category"]
    if row.get("strength") in STRENGTHS:
        found["strength"] = STRENGTHS[row["strength"]]
    return found


def letter_of(answer: str, options: dict[str, str], where: str) -> str:
    """The option that is right, given by its letter or its text."""
    if answer in options:
        return answer
    same = [letter for letter, text in options.items() if text.strip() == answer]
    same = same or [letter for letter in options if letter == answer.upper()]
    if len(same) != 1:
        raise DataError(f"{where}: answer is {answer!r}, the options are {', '.join(options)}")
    return same[0]


def picture_cell(row: dict[str, str], where: str) -> str:
    """The one picture of a row: base64 or an index; a list of one is that one."""
    cell = row.get("image", "").strip()
    if not cell.startswith("["):
        return cell
    try:
        [cell] = ast.literal_eval(cell)
    except (ValueError, SyntaxError) as error:
        problem = "image is a list of several; one picture to a question is what can be asked here"
        raise DataError(f"{where}: {problem}") from error
    return str(cell)


def decode_picture(cell: str, where: str) -> tuple[str, bytes]:
    """(a name that follows from the bytes, the file's bytes)."""
    try:
        content = base64.b64decode(cell.rpartition(",")[2])  # a data: URI's head ends in a comma
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: image is not base64 ({error})") from error
    ending = ".png" if content.startswith(b"\x89PNG") else ".jpg"
    return hashlib.sha256(content).hexdigest()[:20] + ending, content


def keep_picture(cell: str, cache: Path, where: str) -> Path:
    """Put a picture that came as base64 into the folder `cache`, once, if it can be opened."""
    name, content = decode_picture(cell, where)
    path = cache / name
    if not path.exists():
        open_bytes(content, where)
        cache.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, content)
    return path


def open_bytes(content: bytes, where: str) -> Image.Image:
    try:
        return open_image(io.BytesIO(content))
    except DataError as error:
        problem = f"image cannot be read as an image ({error.__cause__})"
        raise DataError(f"{where}: {problem}") from error


# ---------------------------------------------------------------- damaged copies


def draw_damage(name: str, seed: int) -> tuple[str, int]:
    """(type, seed) of the damage done to the picture of this file name: one type, stage first."""
    rng = np.random.default_rng([seed, crc32(name.encode())])
    [(type, _)] = sample_degradations(rng, 1, 1)
    return type, int(rng.integers(2**31))


def damage_tsv(source: Path, target: Path, levels: list[float], seed: int = 0) -> list[Path]:
    """Write a copy of a TSV for each level, whole or not at all; returns the files.

    Pictures are damaged and in PNG, so nothing else is lost (several times larger), with the
    columns degradation, intensity and damage_seed. One level: `target`; several: target_25.tsv ..
    A row that borrows another's picture still does.
    """
    names = [target]
    if len(levels) > 1:
        names = [target.with_name(f"{target.stem}_{percent(s)}.tsv") for s in levels]
    if len(set(names)) < len(levels) or source.resolve() in [name.resolve() for name in names]:
        raise SystemExit(f"{target}: the levels {levels} need files of their own, not {source}")
    temporary = [name.with_name(name.name + ".tmp") for name in names]
    drawn: dict[str, tuple[str, int]] = {}  # index -> type and seed of its damage
    writers: list[csv.DictWriter] = []
    with ExitStack() as stack:
        for where, row in rows_of(source):
            if not writers:
                columns = [*row, "degradation", "intensity", "damage_seed"]
                for name in temporary:
                    file = stack.enter_context(open(name, "w", encoding="utf-8", newline=""))
                    writers.append(
                        csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n")
                    )
                    writers[-1].writeheader()
            cell, image = picture_cell(row, where), None
            if len(cell) > LONGEST_INDEX:
                name, content = decode_picture(cell, where)
                image = np.asarray(open_bytes(content, where))
                drawn[row["index"]] = draw_damage(name, seed)
            elif not cell:
                raise DataError(f"{where}: no image inside the file, so none to damage")
            type, damage_seed = drawn.get(cell if image is None else row["index"], ("", ""))
            for writer, s in zip(writers, levels):
                if image is not None:
                    cell = encode_png(degrade(image, [(type, s)], damage_seed))
                damage = {"degradation": type, "intensity": f"{s:g}", "damage_seed": damage_seed}
                writer.writerow(row | {"image": cell} | damage)
    for whole, name in zip(temporary, names):
        os.replace(whole, name)
    return names


def percent(s: float) -> str:
    """0.25 as `25`, 0.125 as `12p5`."""
    return f"{100 * s:g}".replace(".", "p")


def encode_png(image: np.ndarray) -> str:
    """(H, W, 3) -> base64."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
