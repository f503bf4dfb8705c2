"""Public benchmarks -> records that evaluate.py asks about, and damaged copies for other tools.

    *.tsv     MMMB, MMStar, RealWorldQA, R-Bench-Dis and any other in VLMEvalKit's form
    *.csv     R-Bench's own Ref_Release.csv (UTF-8 or GB18030), beside its folder dis_image: choice
              and open questions, captions
    *.json, *.jsonl
              A-OKVQA, beside a COCO folder (--images): each question with its choices, and again
              without them (direct answer)

    python evaluate.py --benchmark MMStar.tsv --levels 0.25 0.5 1
    python -m rr1.evaluation.benchmarks damage MMStar.tsv hurt.tsv --levels 0.25 0.5 1

The second writes hurt_25.tsv, hurt_50.tsv and hurt_100.tsv. Both damage a picture alike: one type
drawn for each picture, the same at every level, fixed by --seed and the picture (in a TSV its
bytes). RealWorldQA (CC BY-ND) may be damaged at home, but not passed on so.
"""

import argparse
import csv
import io
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from string import ascii_uppercase

from rr1 import records
from rr1.chain import Chain
from rr1.evaluation.tsv import (
    STRENGTHS,
    as_list,
    choice_question,
    damage_tsv,
    left_out,
    read_tsv,
)
from rr1.records import DataError, inside, one_line_errors

# of a record, that go into predictions.jsonl
FIELDS = ("benchmark", "letters", "strength", "category", "references", "circle", "seed")
R_BENCH = ("name", "question", "choice", "answer", "type", "distortion", "strength")
FORMS = {"MCQ": "choice", "VQA": "open", "CAP": "caption"}
OPTION = re.compile(r"(?:^|[;\uff1b])\s*([A-Z])\s*[.:\uff0e]")
# R-Bench numbers its 33 distortions: the step in which each happens, and its group
DISTORTIONS = """\
01 environment, blur
02 environment, wild
03 environment, wild
04 environment, wild
05 camera, blur
06 camera, spatial
07 camera, wild
08 camera, wild
09 analog, noise
10 analog, noise
11 analog, noise
12 analog, noise
13 analog, spatial
14 source, chrominance
15 source, compression
16 source, compression
17 source, compression
18 source, spatial
19 channel, spatial
20 channel, spatial
21 channel, spatial
22 channel, spatial
23 receive, chrominance
24 receive, chrominance
25 receive, luminance
26 receive, luminance
27 receive, luminance
28 enhancement, blur
29 enhancement, chrominance
30 enhancement, chrominance
31 enhancement, noise
32 enhancement, chrominance
33 enhancement, chrominance""".splitlines()


def read(
    path: str | Path, images: str | Path | None, cache: Path, skip_bad: bool = False
) -> tuple:
    """The records of a benchmark, and what is to be said about them.

    `images`: the folder of its pictures (default: the file's own); `cache`: where pictures that
    come inside a TSV are put. DataError names file, line and what is wrong; with `skip_bad` such a
    record is left out. Clean pictures are their own clean picture. A question whose answer is none
    of its options is kept, and never right.
    """
    path = Path(path)
    readers = {
        ".tsv": read_tsv,
        ".csv": read_r_bench,
        ".json": read_a_okvqa,
        ".jsonl": read_a_okvqa,
    }
    if not path.is_file() or path.suffix not in readers:
        endings = ", ".join(readers)
        raise SystemExit(f"--benchmark {path}: expected a file that ends in {endings}")
    bad = []
    folder = Path(images) if images else path.parent
    questions = readers[path.suffix](path, folder, cache, bad if skip_bad else None)
    if not questions:
        first = f" that can be used; the first: {bad[0]}" if bad else ""
        raise DataError(f"{path}: holds no questions{first}")
    notes = [f"left out: {why}" for why in bad]
    found = []
    for question in questions:
        record = {
            "benchmark": path.stem,
            "choices": None,
            "response": None,
            "chain": Chain(),
        }
        if "degradations" not in question:
            record |= {"degradations": [], "clean_image": question["image"]}
        found.append(record | question)
        answer, letters = question["answer"], question.get("letters")
        if letters and answer is not None and answer not in list(letters):
            why = f"the answer {answer!r} is none of the options {', '.join(letters)}"
            notes.append(f"never right: {question['where']}: {why}")
    return found, notes


# ---------------------------------------------------------------- R-Bench


def read_r_bench(
    path: Path, images: Path, cache: Path, bad: list[str] | None
) -> list[dict]:
    """Pictures: dis_image/NAME in `images`. A caption's answer is a printed list of five."""
    rows = csv.DictReader(io.StringIO(decode(path), newline=""))
    there = rows.fieldnames or ()
    missing = [name for name in R_BENCH if name not in there]
    if missing:
        columns = f"no column {', '.join(missing)}; there are {', '.join(there)}"
        raise DataError(f"{path}:1: {columns}")
    questions = []
    for cells in rows:
        where = f"{path}:{rows.line_num}"
        with left_out(bad, where):
            row = {name: (cells[name] or "").strip() for name in R_BENCH}
            image = find_image(images, row["name"])
            number = {"number": rows.line_num, "where": where, "image": image}
            questions.append(read_r_bench_row(row) | number)
    return questions


def decode(path: Path) -> str:
    """The text of a file in UTF-8, or else in GB18030, as R-Bench publishes it."""
    content = path.read_bytes()
    for encoding in ("utf-8-sig", "gb18030"):
        with suppress(UnicodeDecodeError):
            return content.decode(encoding)
    raise DataError(f"{path}: neither UTF-8 nor GB18030")


def read_r_bench_row(row: dict) -> dict:
    if row["type"] not in FORMS or row["strength"] not in STRENGTHS:
        came = f"type is {row['type']!r} and strength {row['strength']!r}"
        raise ValueError(f"{came}; expected MCQ, VQA or CAP and 1, 2 or 3")
    form, text, answer = FORMS[row["type"]], row["question"], row["answer"]
    question = {
        "id": row["name"],
        "form": form,
        "question": text,
        "answer": answer,
        "strength": STRENGTHS[row["strength"]],
        "category": name_of_distortion(row["distortion"]),
        "degradations": None,  # not known
    }
    if form == "choice":
        question |= choice_question(text, read_options(row["choice"]), answer)
    elif form == "caption":
        question["references"] = as_list(answer)
        if not answer.startswith("[") or not question["references"]:
            came = f"answer is {answer[:60]!r}"
            raise ValueError(f"{came}; expected a printed list of captions")
        question["answer"] = question["references"][0]
    return question


def name_of_distortion(number: str) -> str:
    """`05 camera, blur`; what is no number of R-Bench's is a name already."""
    if not number.isdigit() or not 1 <= int(number) <= len(DISTORTIONS):
        return number
    return DISTORTIONS[int(number) - 1]


def read_options(choice: str) -> dict:
    """`A.running; B.Play football` -> {letter: text}."""
    _, *parts = OPTION.split(choice)
    texts = [text.strip(" ;\uff1b") for text in parts[1::2]]
    options = dict(zip(parts[::2], texts))
    if not options or list(options) != list(ascii_uppercase[: len(options)]):
        raise ValueError(f"choice is {choice!r}; expected `A.one; B.two`")
    return options


def find_image(images: Path, name: str) -> str:
    """The picture's file, which the table may name without its ending."""
    path = inside(images, f"dis_image/{name}")
    for ending in ("", ".png", ".jpg"):
        if Path(path + ending).is_file():
            return path + ending
    raise ValueError(f"no {path}: give --images, the folder that holds dis_image")


# ---------------------------------------------------------------- A-OKVQA


def read_a_okvqa(
    path: Path, images: Path, cache: Path, bad: list[str] | None
) -> list[dict]:
    """Each question with its choices, and without (direct), less those marked difficult."""
    found = records.read(path, images, bad is not None)
    if bad is not None:
        bad += found.bad
    questions = []
    for r in found:
        asked = {name: r[name] for name in ("number", "where", "id", "image")}
        with left_out(bad, r["where"]):
            if "direct_answers" not in r and "correct_choice_idx" not in r:
                missing = "neither correct_choice_idx nor direct_answers"
                raise ValueError(f"{missing}: expected A-OKVQA's train or val file")
            options = dict(zip(ascii_uppercase, r["choices"]))
            answer = "" if r["answer"] is None else ascii_uppercase[int(r["answer"])]
            questions.append(asked | choice_question(r["question_alone"], options, answer))
            people = r.get("direct_answers")
            if people and not r.get("difficult_direct_answer"):
                [(usual, _)] = Counter(people).most_common(1)
                direct = {
                    "number": f"{r['number']} direct",
                    "form": "direct",
                    "question": r["question_alone"],
                    "answer": usual,
                    "references": people,
                }
                questions.append(asked | direct)
    return questions


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["damage"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument(
        "--seed", type=int, default=0, help="fixes the damage of each picture"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out, and name, rows without a usable picture",
    )
    options = parser.parse_args(argv)
    source, bad = options.source, [] if options.skip_bad else None
    if source.suffix != ".tsv" or not source.is_file():
        raise SystemExit(f"{source}: expected a .tsv file")
    written = damage_tsv(source, options.target, options.levels, options.seed, bad)
    for why in bad or ():
        print("left out:", why)
    print("written:", ", ".join(map(str, written)))


if __name__ == "__main__":
    with one_line_errors():
        main()
