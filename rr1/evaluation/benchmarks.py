"""Public benchmarks -> records that evaluate.py asks about, and damaged copies for other tools.

    *.tsv     MMMB, MMStar, RealWorldQA, R-Bench-Dis and any other in VLMEvalKit's form
    *.csv     R-Bench's own Ref_Release.csv (GB18030), beside its folder dis_image: choice and open
              questions, captions
    *.json    A-OKVQA, beside a COCO folder (--images): each question with its choices, and again
              without them (direct answer)

    python evaluate.py --benchmark MMStar.tsv --levels 0.25 0.5 1
    python -m rr1.evaluation.benchmarks damage MMStar.tsv hurt.tsv --levels 0.25 0.5 1

The second writes hurt_25.tsv, hurt_50.tsv and hurt_100.tsv. Both damage a picture alike: one type
drawn for each picture, the same at every level, fixed by --seed and the picture (in a TSV its
bytes). RealWorldQA (CC BY-ND) may be damaged at home, but not passed on so.
"""

import argparse
import ast
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase

from rr1 import records
from rr1.chain import Chain
from rr1.evaluation.tsv import STRENGTHS, choice_prompt, damage_tsv, read_tsv
from rr1.records import DataError

# of a record, that go into predictions.jsonl
FIELDS = ("benchmark", "letters", "strength", "category", "references")
R_BENCH = ("name", "question", "choice", "answer", "type", "distortion", "strength")
FORMS = {"MCQ": "choice", "VQA": "open", "CAP": "caption"}
OPTION = re.compile(r"(?:^|[;\uff1b])\s*([A-Z])\s*[.:\uff0e]")


def read(path: str | Path, images: str | Path | None, cache: Path) -> list[dict]:
    """The records of a benchmark; DataError names file, line and what is wrong.

    `images`: the folder of its pictures (default: the file's own); `cache`: where pictures that
    come inside a TSV are put. Clean pictures are their own clean picture; what damaged the others
    is not known.
    """
    path = Path(path)
    readers = {".tsv": read_tsv, ".csv": read_r_bench, ".json": read_a_okvqa}
    if not path.is_file() or path.suffix not in readers:
        endings = ", ".join(readers)
        raise SystemExit(f"--benchmark {path}: expected a file that ends in {endings}")
    found = []
    for question in readers[path.suffix](path, Path(images) if images else path.parent, cache):
        record = {"benchmark": path.stem, "choices": None, "response": None, "chain": Chain()}
        record |= {"number": question["where"].rpartition(":")[2]} | question
        record["degradations"] = None
        if not record.pop("damaged"):
            record |= {"degradations": [], "clean_image": record["image"]}
        found.append(record)
    if not found:
        raise DataError(f"{path}: holds no questions")
    return found


# ---------------------------------------------------------------- R-Bench


def read_r_bench(path: Path, images: Path, cache: Path) -> Iterator[dict]:
    """Pictures: dis_image/NAME in `images`. A caption's answer is a printed list of five."""
    try:
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="gb18030"), newline=""))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not in GB18030 ({error}): is it R-Bench's own file?") from error
    there = rows.fieldnames or ()
    missing = [name for name in R_BENCH if name not in there]
    if missing:
        columns = f"no column {', '.join(missing)}; there are {', '.join(there)}"
        raise DataError(f"{path}:1: {columns}")
    for cells in rows:
        where = f"{path}:{rows.line_num}"
        row = {name: (cells[name] or "").strip() for name in R_BENCH}
        if row["type"] not in FORMS or row["strength"] not in STRENGTHS:
            came = f"type is {row['type']!r} and strength {row['strength']!r}"
            raise DataError(f"{where}: {came}; expected MCQ, VQA or CAP and 1, 2 or 3")
        question = {
            "where": where,
            "id": row["name"],
            "form": FORMS[row["type"]],
            "question": row["question"],
            "answer": row["answer"],
            "image": find_image(images / "dis_image" / row["name"], where),
            "damaged": True,
            "strength": STRENGTHS[row["strength"]],
            "category": row["distortion"],
        }
        if question["form"] == "choice":
            options = read_options(row, where)
            question["question"] = choice_prompt(row["question"], options)
            question["choices"], question["letters"] = list(options.values()), "".join(options)
        elif question["form"] == "caption":
            question["references"] = read_references(row["answer"], where)
            question["answer"] = question["references"][0]
        yield question


def read_options(row: dict[str, str], where: str) -> dict[str, str]:
    """`A.running; B.Play football` -> {letter: text}."""
    _, *parts = OPTION.split(row["choice"])
    texts = [text.strip(" ;\uff1b") for text in parts[1::2]]
    options = dict(zip(parts[::2], texts))
    if row["answer"] not in options or list(options) != list(ascii_uppercase[: len(options)]):
        came = f"answer {row['answer']!r} to the choice {row['choice']!r}"
        raise DataError(f"{where}: {came}; expected a letter of `A.one; B.two`")
    return options


def read_references(answer: str, where: str) -> list[str]:
    try:
        references = [str(text) for text in ast.literal_eval(answer)]
    except (ValueError, SyntaxError, TypeError):
        references = []
    if not references:
        came = f"answer is {answer[:60]!r}"
        raise DataError(f"{where}: {came}; expected a printed list of captions")
    return references


def find_image(image: Path, where: str) -> str:
    """The picture's file, which the table may name without its ending."""
    for ending in ("", ".png", ".jpg"):
        found = image.with_name(image.name + ending)
        if found.is_file():
            return str(found)
    raise DataError(f"{where}: no {image}: give --images, the folder that holds dis_image")


# ---------------------------------------------------------------- A-OKVQA


def read_a_okvqa(path: Path, images: Path, cache: Path) -> Iterator[dict]:
    """Each question with its choices, and without (direct), less those marked difficult."""
    for r in records.read(path, images):
        where = f"{path}:{r['number']}"
        if "direct_answers" not in r and "correct_choice_idx" not in r:
            missing = "neither correct_choice_idx nor direct_answers"
            raise DataError(f"{where}: {missing}: expected A-OKVQA's train or val file")
        options = dict(zip(ascii_uppercase, r["choices"]))
        asked = {"where": where, "id": r["id"], "image": r["image"], "damaged": False}
        choice = {"form": "choice", "question": choice_prompt(r["question_alone"], options)}
        choice |= {"choices": r["choices"], "letters": "".join(options), "answer": None}
        if r["answer"] is not None:
            choice["answer"] = ascii_uppercase[int(r["answer"])]
        yield asked | choice
        answers = r.get("direct_answers")
        if answers and not r.get("difficult_direct_answer"):
            [(usual, _)] = Counter(answers).most_common(1)
            direct = {"number": f"{r['number']} direct", "form": "direct"}
            direct |= {"question": r["question_alone"], "answer": usual, "references": answers}
            yield asked | direct


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["damage"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--seed", type=int, default=0, help="fixes the damage of each picture")
    options = parser.parse_args(argv)
    source = options.source
    if source.suffix != ".tsv" or not source.is_file():
        raise SystemExit(f"{source}: expected a .tsv file")
    written = damage_tsv(source, options.target, options.levels, options.seed)
    print("written:", ", ".join(map(str, written)))


if __name__ == "__main__":
    main()
