"""Public benchmarks -> records that evaluate.py asks about, and damaged copies of them that other tools read.

    *.tsv     MMMB, MMStar, RealWorldQA, R-Bench-Dis and any other in VLMEvalKit's form: index, image (base64, or another row's
              index), question, hint, A, B, .., answer, category
    *.csv     R-Bench's own Ref_Release.csv (GB18030), beside its folder dis_image: choice and open questions, captions
    *.json    A-OKVQA, beside a COCO folder (--images): each question with its choices, and again without them (direct answer)

    python evaluate.py --benchmark MMStar.tsv --levels 0.25 0.5 1
    python -m rr1.evaluation.benchmarks damage MMStar.tsv MMStar_hurt.tsv --levels 0.25 0.5 1     # -> MMStar_hurt_25.tsv, .., _100.tsv

Both damage a picture alike: one type drawn for each picture, the same at every level, fixed by --seed and the picture (in a TSV its bytes).
RealWorldQA (CC BY-ND) may be damaged at home, but not passed on so.
"""
from __future__ import annotations

import argparse
import ast
import base64
import binascii
import csv
import hashlib
import io
import os
import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from string import ascii_uppercase
from typing import Iterator
from zlib import crc32

import numpy as np
from PIL import Image
from tqdm import tqdm

from degrade import degrade, sample_degradations
from rr1 import data
from rr1.chain import Chain
from rr1.records import DataError

FIELDS = ("benchmark", "letters", "strength", "category", "references")      # of a record, that go into predictions.jsonl
STRENGTHS = {"1": "low", "2": "mid", "3": "high", "low": "low", "mid": "mid", "high": "high"}
LONGEST_INDEX = 64                   # an image cell of at most so many characters is another row's index
REQUEST = "Please select the correct answer from the options above."


def read(path: str | Path, images: str | Path | None, cache: Path) -> list[dict]:
    """The records of a benchmark. `images`: the folder of its pictures (default: the file's own), `cache`: where pictures that
    come inside a TSV are put. DataError names file, line and what is wrong."""
    path = Path(path)
    readers = {".tsv": read_tsv, ".csv": read_r_bench, ".json": read_a_okvqa, ".jsonl": read_a_okvqa}
    if not path.is_file() or path.suffix not in readers:
        raise SystemExit(f"--benchmark {path}: expected a file that ends in {', '.join(readers)}; see rr1/evaluation/benchmarks.py")
    records = readers[path.suffix](path, Path(images) if images else path.parent, cache)
    if not records:
        raise DataError(f"{path}: holds no questions")
    return records


def record(where: str, number: int | str, form: str, question: str, answer: str | None, image: str, damaged: bool, **more) -> dict:
    """What evaluate.py needs of a question. Clean pictures are their own clean picture; what damaged the others is not known."""
    picture = {"degradations": None} if damaged else {"degradations": [], "clean_image": image}
    path, name = where.rpartition(":")[0], more.get("id", number)
    return {"id": name, "where": where, "number": number, "benchmark": Path(path).stem, "form": form, "question": question, "choices": None,
            "answer": answer, "image": image, "response": None, "chain": Chain(), **picture, **more}


def choice_prompt(question: str, options: dict[str, str], hint: str = "") -> str:
    """The question of the multiple-choice family: hint, question, options one a line, a request to choose."""
    listed = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    return (f"Hint: {hint}\n" if hint else "") + f"Question: {question}\nOptions:\n{listed}{REQUEST}"


# ---------------------------------------------------------------- VLMEvalKit's TSV

def rows_of(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(file:line, {column: text}) of a TSV, one row at a time; a cell that is absent or NaN is ""."""
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        try:
            for row in tqdm(reader, path.name, unit=" rows", delay=2, disable=None):
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: has not the {len(reader.fieldnames)} columns of the first line: is the file whole?")
                yield where, {name: "" if text.strip().lower() == "nan" else text for name, text in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not a TSV in UTF-8 ({error})") from error


def read_tsv(path: Path, images: Path, cache: Path) -> list[dict]:
    records, pictures, borrowed = [], {}, {}                     # index -> its picture's file, index -> index that has the picture
    for where, row in rows_of(path):
        if missing := [name for name in ("index", "question") if name not in row]:
            raise DataError(f"{where}: no column {missing[0]}; there are {', '.join(row)}")
        options = {a: row[a] for a in ascii_uppercase if row.get(a)}
        answer, cell = row.get("answer", "").strip() or None, picture_cell(row, where)
        if options and answer is not None and answer not in options:
            same = [a for a, text in options.items() if text.strip() == answer] or [a for a in options if a == answer.upper()]
            if len(same) != 1:
                raise DataError(f"{where}: answer is {answer!r}, the options are {', '.join(options)}")
            answer = same[0]
        if len(cell) > LONGEST_INDEX:
            pictures[row["index"]] = str(keep_picture(cell, cache, where))
        elif cell:
            borrowed[row["index"]] = cell
        elif row.get("image_path"):
            pictures[row["index"]] = os.path.join(images, row["image_path"])
        else:
            raise DataError(f"{where}: no image")
        question = choice_prompt(row["question"], options, row.get("hint", "")) if options else row["question"]
        more = {"choices": list(options.values()), "letters": "".join(options)} if options else {}
        more |= {name: value for name, value in (("category", row.get("category")), ("strength", STRENGTHS.get(row.get("strength")))) if value}
        records.append(record(where, where.rpartition(":")[2], "choice" if options else "open", question, answer, row["index"],
                              "strength" in row or path.stem.startswith("R-Bench"), id=row["index"], **more))
    for r in records:
        index = borrowed.get(r["image"], r["image"])
        if index not in pictures:
            raise DataError(f"{r['where']}: image is {index!r}, and there is no row of that index with a picture of its own")
        r |= {name: pictures[index] for name in ("image", "clean_image") if name in r}
    return records


def picture_cell(row: dict[str, str], where: str) -> str:
    """The one picture of a row: base64 or an index; a list of one is that one."""
    cell = row.get("image", "").strip()
    if cell.startswith("["):
        try:
            [cell] = ast.literal_eval(cell)
        except (ValueError, SyntaxError) as error:
            raise DataError(f"{where}: image is a list of several; one picture to a question is what can be asked here") from error
    return str(cell)


def decode_picture(cell: str, where: str) -> tuple[str, bytes]:
    """(a name that follows from the bytes, the file's bytes)."""
    try:
        raw = base64.b64decode(cell.rpartition(",")[2])          # a data: URI's head ends in a comma
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: image is not base64 ({error})") from error
    return hashlib.sha256(raw).hexdigest()[:20] + (".png" if raw.startswith(b"\x89PNG") else ".jpg"), raw


def keep_picture(cell: str, cache: Path, where: str) -> Path:
    """Put a picture that came as base64 into the folder `cache`, once; it is tried before it gets its name."""
    name, raw = decode_picture(cell, where)
    path = cache / name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / (name + ".tmp")
        temporary.write_bytes(raw)
        try:
            data.open_image(temporary)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        os.replace(temporary, path)
    return path


# ---------------------------------------------------------------- R-Bench and A-OKVQA

def read_r_bench(path: Path, images: Path, cache: Path) -> list[dict]:
    """Columns name, question, choice ("A.running; B.Play football"), answer, type (MCQ, VQA, CAP), distortion, strength (1, 2, 3);
    a caption's answer is a printed list of five. Pictures: dis_image/NAME in `images`."""
    records, needed = [], ("name", "question", "choice", "answer", "type", "distortion", "strength")
    try:
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="gb18030"), newline=""))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not in GB18030 ({error}): is it R-Bench's own file?") from error
    if missing := [name for name in needed if name not in (rows.fieldnames or ())]:
        raise DataError(f"{path}:1: no column {', '.join(missing)}; there are {', '.join(rows.fieldnames or ())}")
    for cells in rows:
        where, row = f"{path}:{rows.line_num}", {name: (cells[name] or "").strip() for name in needed}
        more = {"strength": STRENGTHS.get(row["strength"]), "category": row["distortion"]}
        form, answer, question = {"MCQ": "choice", "VQA": "open", "CAP": "caption"}.get(row["type"]), row["answer"], row["question"]
        if form is None or more["strength"] is None:
            raise DataError(f"{where}: type is {row['type']!r} and strength {row['strength']!r}; expected MCQ, VQA or CAP and 1, 2 or 3")
        if form == "choice":
            parts = re.split(r"(?:^|[;\uff1b])\s*([A-Z])\s*[.:\uff0e]", row["choice"])[1:]
            options = {letter: text.strip(" ;\uff1b") for letter, text in zip(parts[::2], parts[1::2])}
            if answer not in options or list(options) != list(ascii_uppercase[:len(options)]):
                raise DataError(f"{where}: answer {answer!r} to the choice {row['choice']!r}; expected a letter of `A.one; B.two`")
            question = choice_prompt(question, options)
            more |= {"choices": list(options.values()), "letters": "".join(options)}
        elif form == "caption":
            try:
                more["references"] = [str(text) for text in ast.literal_eval(answer)]
                answer = more["references"][0]
            except (ValueError, SyntaxError, TypeError, IndexError) as error:
                raise DataError(f"{where}: answer is {answer[:60]!r}; expected a printed list of captions") from error
        image = images / "dis_image" / row["name"]
        found = next((image.with_name(image.name + end) for end in ("", ".png", ".jpg") if image.with_name(image.name + end).is_file()), None)
        if found is None:
            raise DataError(f"{where}: there is no {image}: give --images, the folder that holds dis_image")
        records.append(record(where, rows.line_num, form, question, answer, str(found), True, id=row["name"], **more))
    return records


def read_a_okvqa(path: Path, images: Path, cache: Path) -> list[dict]:
    """Each question twice: with its choices (equality with the right one), and without (direct), less those marked difficult."""
    records = []
    for r in data.read(path, images):
        if "direct_answers" not in r and "correct_choice_idx" not in r:
            raise DataError(f"{r['where']}: neither correct_choice_idx nor direct_answers: expected A-OKVQA's train or val file")
        options, where = dict(zip(ascii_uppercase, r["choices"])), f"{path}:{r['number']}"
        answer = None if r["answer"] is None else ascii_uppercase[int(r["answer"])]
        records.append(record(where, r["number"], "choice", choice_prompt(r["question_alone"], options), answer, r["image"], False, id=r["id"],
                              choices=r["choices"], letters="".join(options)))
        if r.get("direct_answers") and not r.get("difficult_direct_answer"):
            usual = Counter(r["direct_answers"]).most_common(1)[0][0]
            records.append(record(where, f"{r['number']} direct", "direct", r["question_alone"], usual, r["image"], False, id=r["id"],
                                  references=r["direct_answers"]))
    return records


# ---------------------------------------------------------------- damage

def draw_damage(name: str, seed: int) -> tuple[str, int]:
    """(type, seed) of the damage done to the picture of this file name: one type a picture, drawn stage first."""
    rng = np.random.default_rng([seed, crc32(name.encode())])
    return sample_degradations(rng, 1, 1)[0].type, int(rng.integers(2**31))


def damage_tsv(source: Path, target: Path, levels: list[float], seed: int = 0) -> list[Path]:
    """Write a copy of a TSV for each level, its pictures damaged and in PNG (so nothing else is lost; several times larger), with the
    columns degradation, intensity and damage_seed. One level: `target`; several: target_25.tsv, .. A row that borrows another's
    picture still does. Whole or not at all."""
    names = [target] if len(levels) == 1 else [target.with_name(f"{target.stem}_{100 * s:g}".replace(".", "p") + ".tsv") for s in levels]
    if len(set(names)) < len(levels) or source.resolve() in {name.resolve() for name in names}:
        raise SystemExit(f"{target}: the levels {levels} need files of their own, other than {source}")
    temporary, drawn = [name.with_name(name.name + ".tmp") for name in names], {}
    with ExitStack() as stack:
        files = [stack.enter_context(open(name, "w", encoding="utf-8", newline="")) for name in temporary]
        writers: list[csv.DictWriter] = []
        for where, row in rows_of(source):
            if not writers:
                writers = [csv.DictWriter(f, [*row, "degradation", "intensity", "damage_seed"], delimiter="\t", lineterminator="\n") for f in files]
                for writer in writers:
                    writer.writeheader()
            cell, image = picture_cell(row, where), None
            if len(cell) > LONGEST_INDEX:
                name, raw = decode_picture(cell, where)
                drawn[row["index"]] = draw_damage(name, seed)
                try:
                    image = np.asarray(data.open_image(io.BytesIO(raw)))
                except DataError as error:
                    raise DataError(f"{where}: image cannot be read ({error.__cause__})") from error
            elif not cell:
                raise DataError(f"{where}: no image inside the file, so none to damage")
            kind, damage_seed = drawn.get(row["index"] if image is not None else cell, ("", ""))
            for writer, s in zip(writers, levels):
                if image is not None:
                    png = io.BytesIO()
                    Image.fromarray(degrade(image, [(kind, s)], damage_seed)).save(png, "PNG")
                    cell = base64.b64encode(png.getvalue()).decode()
                writer.writerow(row | {"image": cell, "degradation": kind, "intensity": f"{s:g}", "damage_seed": damage_seed})
    for name, whole in zip(temporary, names):
        os.replace(name, whole)
    return names


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["damage"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="intensities (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="fixes which damage each picture gets (default: %(default)s)")
    a = parser.parse_args(argv)
    if a.source.suffix != ".tsv" or not a.source.is_file():
        raise SystemExit(f"{a.source}: expected a .tsv file")
    print("written:", ", ".join(map(str, damage_tsv(a.source, a.target, a.levels, a.seed))))


if __name__ == "__main__":
    main()
