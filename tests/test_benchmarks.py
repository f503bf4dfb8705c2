"""Benchmarks in the forms that they are published in: reading, scoring, damage, the judge."""

import base64
import csv
import io
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import openai
import pytest
from PIL import Image

import evaluate
from degrade import degrade
from rr1 import records
from rr1.chain import Chain, build_prompt, render
from rr1.evaluation import benchmarks, metrics, predictions, report, scores, votes
from rr1.evaluation import tsv as evaluation_tsv
from rr1.evaluation.tsv import REQUEST, damage_tsv, rows_of


def picture(seed=0, size=40, format="PNG"):
    """A picture's base64, as a TSV holds it."""
    file = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    ).save(file, format)
    return base64.b64encode(file.getvalue()).decode()


def write_tsv(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


ROWS = [
    {
        "index": 0,
        "image": picture(0),
        "question": 'What "is" it?\nLook well.',
        "hint": "",
        "A": "a cat",
        "B": "a dog",
        "C": "None",
        "D": "NaN",
        "answer": "B",
        "category": "animals",
        "l2-category": "pets",
        "split": "val",
    },
    {
        "index": 7,
        "image": "0",
        "question": "And here?",
        "hint": "It barks.",
        "A": "yes",
        "B": "no",
        "C": "",
        "D": "",
        "answer": "A",
        "category": "words",
    },
    {
        "index": 8,
        "image": "9",
        "question": "Later?",
        "A": "yes",
        "B": "nan",
        "C": "no",
        "answer": "C",
        "category": "words",
    },
    {
        "index": 9,
        "image": f"['{picture(1, 300, 'PNG')}']",
        "question": "Large?",
        "A": "yes",
        "B": "no",
        "answer": "yes",
        "category": "animals",
    },
    {
        "index": 10,
        "image": picture(2, 40, "JPEG"),
        "question": "how many?",
        "answer": "two",
    },
]


def read(path, images, cache):
    return benchmarks.read(path, images, cache)[0]


@pytest.fixture
def tsv(tmp_path):
    return write_tsv(tmp_path / "MMTest.tsv", ROWS)


# ---------------------------------------------------------------- VLMEvalKit's TSV


def test_a_tsv(tsv, tmp_path):
    a, b, c, d, e = read(tsv, None, tmp_path / "cache")
    assert (
        a["question"]
        == f'Question: What "is" it?\nLook well.\nOptions:\nA. a cat\nB. a dog\n{REQUEST}'
    )
    assert (
        b["question"]
        == f"Hint: It barks.\nQuestion: And here?\nOptions:\nA. yes\nB. no\n{REQUEST}"
    )
    assert (c["letters"], c["choices"], c["answer"]) == (
        "AC",
        ["yes", "no"],
        "C",
    )  # an absent option leaves the letters as they are
    assert (
        a["image"] == b["image"] == a["clean_image"] and c["image"] == d["image"]
    )  # by reference, back and forth
    assert (
        d["answer"] == "A"
        and e["form"] == "open"
        and e["choices"] is None
        and e["answer"] == "two"
    )
    assert [r["id"] for r in (a, b, c, d, e)] == ["0", "7", "8", "9", "10"] and a[
        "where"
    ].endswith("MMTest.tsv:3")
    assert np.array_equal(
        records.open_image(a["image"]),
        np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8),
    )
    assert len(ROWS[3]["image"]) > 300_000 and records.open_image(d["image"]).size == (
        300,
        300,
    )
    assert e["image"].endswith(".jpg") and sorted(
        p.suffix for p in (tmp_path / "cache").iterdir()
    ) == [".jpg", ".png", ".png"]
    assert (
        {r["benchmark"] for r in (a, b)} == {"MMTest"}
        and a["category"] == "animals"
        and "category" not in e
    )


def test_pictures_beside_a_tsv_and_damage_of_another_make(tmp_path):
    row = {
        "index": 1,
        "image_path": "x/1.png",
        "question": "q",
        "A": "a",
        "B": "b",
        "answer": "A",
        "strength": "3",
    }
    path = write_tsv(tmp_path / "R-Bench-Dis.tsv", [row])
    (r,) = read(path, tmp_path / "pictures", tmp_path)
    assert (
        r["image"] == str(tmp_path / "pictures/x/1.png")
        and r["degradations"] is None
        and r["strength"] == "high"
        and "clean_image" not in r
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": picture(0)[:400]}, "cannot be read as an image"),
        ({"image": "a" * 101}, "not base64"),
        ({"image": ""}, "no image"),
        ({"image": "55"}, "no row of that index"),
        ({"image": f"['{picture(0)}', oh]"}, "no printed list"),
        ({"image": "", "image_path": "../x.png"}, "out of the image folder"),
        ({"image": "", "image_path": "/etc/x.png"}, "out of the image folder"),
        (
            {"image": picture(4), "index": 7},
            "index 7 stands there twice, with other pictures",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    path = write_tsv(
        tmp_path / "x.tsv", [ROWS[1] | {"image": picture(3)}, ROWS[0] | change]
    )
    with pytest.raises(
        records.DataError, match=rf"x\.tsv:4: .*{message}"
    ):  # the row's last line: its question has two
        read(path, None, tmp_path / "cache")


def test_which_sets_come_damaged(tmp_path):
    """By the name in R-Bench's data set and in VLMEvalKit; the references are clean."""
    row = {
        "index": 1,
        "image": picture(0),
        "question": "q",
        "A": "a",
        "B": "b",
        "answer": "A",
    }
    for name, graded, damaged in (
        ("R-bench-dis", False, True),
        ("R-Bench-Dis", True, True),
        ("R-Bench-Ref", True, False),
        ("other", True, True),
        ("other", False, False),
    ):
        path = write_tsv(
            tmp_path / f"{name}.tsv", [row | ({"strength": 2} if graded else {})]
        )
        (record,) = read(path, None, tmp_path)
        assert (
            (record["degradations"] is None) == damaged == ("clean_image" not in record)
        ), name


def test_absent_cells_are_those_of_pandas(tmp_path):
    """None and NA are no options, as VLMEvalKit reads them; Nan is bread."""
    options = {"A": "None", "B": "Nan", "C": "N/A", "D": "nothing", "E": "null"}
    rows = [{"index": 1, "image": picture(0), "question": "q", "answer": "B"} | options]
    (record,) = read(write_tsv(tmp_path / "x.tsv", rows), None, tmp_path)
    assert record["choices"] == ["Nan", "nothing"] and record["letters"] == "BD"


def test_an_answer_that_is_no_option_is_kept_and_never_right(tmp_path):
    """Row 1404 of R-Bench's published file: options A and B, the answer C."""
    path = write_tsv(tmp_path / "x.tsv", [ROWS[1] | {"image": picture(0), "answer": "C"}])
    (record,), notes = benchmarks.read(path, None, tmp_path)
    assert record["answer"] == "C" and len(notes) == 1
    assert notes[0].endswith("x.tsv:2: the answer 'C' is none of the options A, B")
    [job] = predictions.make_jobs([record], None, 0)
    assert [metrics.judge(job | answer(said))["score"] for said in "ABC"] == [0, 0, 0]
    bad = R_BENCH[0] | {"answer": "D"}
    (kept, _), notes = benchmarks.read(
        write_r_bench(tmp_path, [bad, R_BENCH[1]]), None, tmp_path
    )
    assert kept["answer"] == "D" and ["Ref_Release.csv:2" in note for note in notes] == [
        True
    ]


def test_skip_bad_leaves_rows_out_and_names_them(tmp_path):
    good = ROWS[1] | {"image": picture(3)}
    path = write_tsv(tmp_path / "x.tsv", [good, ROWS[0] | {"image": "a" * 101}, ROWS[4]])
    found, notes = benchmarks.read(path, None, tmp_path / "cache", skip_bad=True)
    assert [record["id"] for record in found] == ["7", "10"]
    assert len(notes) == 1 and "x.tsv:4: image is not base64" in notes[0]
    path = write_r_bench(tmp_path, [R_BENCH[0], R_BENCH[1] | {"name": "gone"}])
    found, notes = benchmarks.read(path, None, tmp_path, skip_bad=True)
    assert [record["id"] for record in found] == ["a.png"] and "dis_image/gone" in notes[0]


def test_several_pictures_in_a_row(tmp_path):
    two = f"['{picture(0)}', '{picture(1)}']"
    rows = [
        ROWS[1] | {"image": two},
        ROWS[1] | {"index": 8, "image": "7"},
        ROWS[1] | {"index": 9, "image": "", "image_path": "['a.png', 'b.png']"},
    ]
    path = write_tsv(tmp_path / "x.tsv", rows)
    first, second, third = read(path, tmp_path, tmp_path / "cache")
    assert (
        len(first["image"]) == 2
        and first["image"] == second["image"] == first["clean_image"]
    )
    assert third["image"] == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    jobs = predictions.make_jobs([first], [0.5], 0)
    assert [job["shown"] for job in jobs] == ["clean"] and len(
        predictions.pictures_of(jobs[0])
    ) == 2
    path = write_tsv(tmp_path / "x.tsv", rows[:2])
    damage_tsv(path, tmp_path / "y.tsv", [1.0])
    hurt, again = read(tmp_path / "y.tsv", None, tmp_path / "cache")
    assert len(hurt["image"]) == 2 and hurt["image"] == again["image"] != first["image"]


def test_circles_count_once_and_only_if_all_are_right(tmp_path):
    """MMBench: index 7 again as 1000007 and 2000007, its options turned."""
    row = {"image": picture(0), "question": "q", "A": "red", "B": "blue", "category": "x"}
    turned = {"image": "7", "question": "q", "A": "blue", "B": "red", "category": "x"}
    rows = [
        row | {"index": 7, "answer": "A"},
        turned | {"index": 1000007, "answer": "B"},
        row | {"index": 8, "answer": "A"},
        turned | {"index": 1000008, "image": "8", "answer": "B"},
        row | {"index": 9, "answer": "A"},
        row | {"index": 5000001, "answer": "A"},  # a large number, and no circle
    ]
    found = read(write_tsv(tmp_path / "MMBench.tsv", rows), None, tmp_path)
    assert [record.get("circle") for record in found] == ["7", "7", "8", "8", None, None]
    jobs = predictions.make_jobs(found, [1.0], 0)
    always_a = [job | answer("A") for job in jobs]
    always_red = [job | answer("red") for job in jobs]
    clean = report.of_model(always_a)["table_2"]["clean"]
    assert clean["n"] == 4 and clean["value"] == 2 / 4
    assert report.of_model(always_red)["categories"]["x"]["value"] == 1
    versus = metrics.versus(always_red, always_a)
    assert versus["clean"]["n"] == 4 and versus["clean"]["gained"] == 2


def test_a_bad_file_is_named(tmp_path):
    (tmp_path / "cut.tsv").write_text("index\timage\tquestion\n1\taaaa\n")
    (tmp_path / "odd.tsv").write_text("image\tquestion\naaaa\tq\n")
    (tmp_path / "none.tsv").write_text("index\timage\tquestion\n")
    (tmp_path / "latin.tsv").write_bytes(b"index\timage\tquestion\n1\t0\t\xe9\n")
    for name, message in (
        ("cut", "cut.tsv:2: has not the 3 columns"),
        ("odd", "odd.tsv:2: no column index"),
        ("none", "no questions"),
        ("latin", "not a TSV in UTF-8"),
    ):
        with pytest.raises(records.DataError, match=message):
            read(tmp_path / f"{name}.tsv", None, tmp_path)
    for name in ("gone.tsv", "cut.txt"):
        with pytest.raises(
            SystemExit, match="--benchmark .*expected a file that ends in .tsv, .csv"
        ):
            read(tmp_path / name, None, tmp_path)


# ---------------------------------------------------------------- R-Bench and A-OKVQA

R_BENCH = [
    {
        "name": "a.png",
        "question": "What is he doing?",
        "choice": "A.running; B.Play football;C.sitting; standing",
        "answer": "B",
        "type": "MCQ",
        "strength": "1",
    },
    {
        "name": "b",
        "question": "What is it?",
        "choice": "N",
        "answer": "Caf\u00e9 \u94f6\u884c",
        "type": "VQA",
        "strength": "2",
    },
    {
        "name": "c.png",
        "question": "Describe the image.",
        "choice": "N",
        "answer": "['a dog runs', \"a man's dog\", 'x', 'y', 'z']",
        "type": "CAP",
        "strength": "3",
    },
]


def write_r_bench(folder, rows):
    (folder / "dis_image").mkdir(exist_ok=True)
    for name in "abc":
        Image.new("RGB", (40, 40), name and "red").save(
            folder / "dis_image" / f"{name}.png"
        )
    file = io.StringIO(newline="")
    writer = csv.DictWriter(
        file,
        ["name", "question", "choice", "answer", "type", "score", "distortion", "strength"],
    )
    writer.writeheader()
    writer.writerows(
        [{"score": "[1, 1, 1, 1, 0]", "distortion": "jpeg"} | row for row in rows]
    )
    (folder / "Ref_Release.csv").write_bytes(file.getvalue().encode("gb18030"))
    return folder / "Ref_Release.csv"


def test_r_bench(tmp_path):
    mcq, vqa, cap = read(write_r_bench(tmp_path, R_BENCH), None, tmp_path)
    assert (
        mcq["choices"] == ["running", "Play football", "sitting; standing"]
        and mcq["answer"] == "B"
        and mcq["letters"] == "ABC"
    )
    assert mcq["question"].startswith(
        "Question: What is he doing?\nOptions:\nA. running\nB. Play football\n"
    )
    assert (vqa["form"], vqa["answer"], vqa["question"]) == (
        "open",
        "Caf\u00e9 \u94f6\u884c",
        "What is it?",
    )
    assert cap["form"] == "caption" and cap["references"] == [
        "a dog runs",
        "a man's dog",
        "x",
        "y",
        "z",
    ]
    assert [r["strength"] for r in (mcq, vqa, cap)] == ["low", "mid", "high"] and all(
        r["degradations"] is None for r in (mcq, vqa, cap)
    )
    assert mcq["image"] == str(tmp_path / "dis_image/a.png") and vqa["image"] == str(
        tmp_path / "dis_image/b.png"
    )


@pytest.mark.parametrize(
    "i, change, message",
    [
        (0, {"choice": "running"}, "expected `A.one; B.two`"),
        (0, {"name": "../a.png"}, "out of the image folder|give --images"),
        (1, {"type": "ABC"}, "expected MCQ"),
        (1, {"strength": "9"}, "expected MCQ"),
        (2, {"answer": "a dog"}, "printed list"),
        (2, {"name": "gone.png"}, "no .*gone.png: give --images"),
    ],
)
def test_a_bad_row_of_r_bench_is_named(tmp_path, i, change, message):
    with pytest.raises(records.DataError, match=rf"Ref_Release\.csv:3: .*{message}"):
        read(write_r_bench(tmp_path, [R_BENCH[0], R_BENCH[i] | change]), None, tmp_path)


def test_r_bench_in_utf_8_and_with_full_width_marks(tmp_path):
    """Whoever saves it as UTF-8 keeps all options."""
    choice = "A.red\uff1bB\uff0eorange\uff1bC.yellow"
    path = write_r_bench(tmp_path, [R_BENCH[0] | {"choice": choice}, R_BENCH[1]])
    path.write_bytes(path.read_bytes().decode("gb18030").encode("utf-8"))
    mcq, vqa = read(path, None, tmp_path)
    assert (
        mcq["choices"] == ["red", "orange", "yellow"]
        and vqa["answer"] == R_BENCH[1]["answer"]
    )
    path.write_bytes(b"\xff" + path.read_bytes())
    with pytest.raises(records.DataError, match="neither UTF-8 nor GB18030"):
        read(path, None, tmp_path)


def test_r_benchs_distortions_have_names():
    names = [benchmarks.name_of_distortion(str(i)) for i in range(1, 34)]
    assert len(set(names)) == 33 == len(benchmarks.DISTORTIONS)
    assert len({name.partition(", ")[2] for name in names}) == 7  # groups
    assert names == sorted(names)  # as text: 02 before 10
    assert names[0] == "01 environment, blur" and names[32] == "33 enhancement, chrominance"
    assert names[3] == "04 environment, wild" and names[4] == "05 camera, blur"
    assert benchmarks.name_of_distortion("jpeg") == "jpeg"


def test_a_category_that_begins_with_a_digit(tmp_path):
    rows = [row | {"category": f"{i + 2}D Rotation"} for i, row in enumerate(ROWS[:2])]
    jobs = predictions.make_jobs(
        read(write_tsv(tmp_path / "x.tsv", rows), None, tmp_path), None, 0
    )
    text = report.as_text({"a": report.of_model([job | answer("B") for job in jobs])})
    assert "| 2D Rotation " in text and "| 3D Rotation " in text


def test_a_model_taught_by_index_is_asked_by_index(tmp_path):
    """Of ["2", "3", "4", "1"] the answer 3 is B to one model, and D to another."""
    row = {
        "index": 1,
        "image": picture(0),
        "question": "how many?",
        "answer": "D",
        "hint": "Look.",
    }
    row |= {"A": "2", "B": "3", "C": "4", "D": "1"}
    found = read(write_tsv(tmp_path / "x.tsv", [row]), None, tmp_path)
    [letter] = predictions.make_jobs(found, None, 0, by_letter=True)
    [index] = predictions.make_jobs(found, None, 0, by_letter=False)
    assert index["question"] == "Look.\nhow many?\n0. 2 1. 3 2. 4 3. 1"
    assert letter["question"].endswith(f"D. 1\n{REQUEST}")
    assert metrics.judge(index | answer("3"))["score"] == 1
    assert metrics.judge(letter | answer("3"))["score"] == 0
    assert metrics.judge(index | answer("The answer is D."))["score"] == 1
    reports = {"base": report.of_model([letter | answer("D")])}
    reports["rl"] = report.of_model([index | answer("3")])
    assert "choices were asked: base by letter, rl by index." in report.as_text(reports)


def test_a_okvqa_is_asked_with_and_without_its_choices(tmp_path):
    item = {
        "split": "val",
        "image_id": 7,
        "question_id": "q1",
        "question": "what?",
        "choices": ["cab", "train", "bus", "tram"],
        "correct_choice_idx": 1,
        "direct_answers": ["train"] * 7 + ["tram"] * 2 + ["rail"],
        "difficult_direct_answer": False,
        "rationales": ["r"] * 3,
    }
    (tmp_path / "a.json").write_text(
        json.dumps([item, item | {"question_id": "q2", "difficult_direct_answer": True}])
    )
    choice, direct, difficult = records = read(tmp_path / "a.json", tmp_path, tmp_path)
    assert (
        choice["answer"] == "B"
        and choice["question"]
        == f"Question: what?\nOptions:\nA. cab\nB. train\nC. bus\nD. tram\n{REQUEST}"
    )
    assert (
        direct["form"] == "direct"
        and direct["question"] == "what?"
        and difficult["form"] == "choice"
    )
    (tmp_path / "a.jsonl").write_text(json.dumps(item) + "\n")
    again = read(tmp_path / "a.jsonl", tmp_path, tmp_path)
    assert [r["question"] for r in again] == [choice["question"], "what?"]
    jobs = predictions.make_jobs(records, [0.5], 0)
    assert [job["key"] for job in jobs] == [
        "1 clean",
        "1 0.5",
        "1 direct clean",
        "1 direct 0.5",
        "2 clean",
        "2 0.5",
    ]
    assert (
        jobs[1]["degradations"] == jobs[3]["degradations"]
        and jobs[1]["damage_seed"] == jobs[3]["damage_seed"] is not None
    )
    for said, score in (("Train.", 1), ("tram", 2 / 3), ("rail", 1 / 3), ("a train", 0)):
        assert metrics.judge(jobs[2] | answer(said))["score"] == pytest.approx(score)
    found = report.of_model([job | answer("train") for job in jobs])
    assert (
        found["table_2"]["clean"]["value"]
        == found["others"]["direct"]["clean"]["value"]
        == 1
    )
    assert (
        found["table_2"]["clean"]["n"] == 2 and found["others"]["direct"]["0.5"]["n"] == 1
    )


# ---------------------------------------------------------------- answers


def answer(response, plain=True):
    return {
        "plain": plain,
        "response": response,
        "length": 5,
        "truth_length": None,
        "truncated": False,
    }


@pytest.mark.parametrize(
    "said, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B. dog", "B"),
        ("a dog", "B"),
        ("Dog", "B"),
        ("The answer is B.", "B"),
        ("**C**", "C"),
        ("B is what I see in this", None),
        ("A or B", None),
        ("it is the dog", "B"),
        ("dog and bird", None),
        ("E", None),
        ("", None),
        ("I do not know", None),
        ("1", "B"),
        ("0", "A"),
        ("1. dog", "B"),
        ("9", None),
        ("well " * 9 + "a dog", None),
    ],
)
def test_a_choice_is_read_and_never_guessed(said, letter):
    assert scores.read_choice(said, {"A": "cat", "B": "dog", "C": "bird"}) == letter


FREE_TEXT = {  # what VLMEvalKit's can_infer reads (August 2026)
    "The correct answer is **B**. Here's why: A and C are not there, as one can see.": "B",
    "the answer is C because of the tail, and A is far away from it": "C",
    "I would say it is (B)": "B",
    "B, since A is too small": None,
    "B is what stands there to the left": None,
    "a bird": "C",
    "A dog or a bird": None,
    "D": None,
    "": None,
}


@pytest.mark.parametrize("said", FREE_TEXT)
def test_free_text_is_read_as_vlmevalkit_reads_it(said):
    options = {"A": "cat", "B": "dog", "C": "bird"}
    assert scores.free_text_choice(said, options) == FREE_TEXT[said]


def test_the_letter_after_answer_is_stands_alone():
    """Their pattern takes the D of `dog`."""
    options = {"A": "dog", "B": "bird of prey", "D": "cat"}
    for said in ("The answer is dog", "The answer is Dog"):
        assert scores.read_choice(said, options) == "A"


@pytest.mark.parametrize(
    "said, letter",
    [("2", "A"), ("4", "C"), ("1", None), ("0", None), ("C", "C"), ("3. ", "B")],
)
def test_among_numbers_a_number_is_a_text_and_not_an_index(said, letter):
    assert scores.read_choice(said, {"A": "2", "B": "3", "C": "4"}) == letter


def test_the_answer_part_comes_first():
    chain = render(Chain([("noise", 0.5)], "A veil", "a cat", "a cat sits there", "B"))
    assert (
        scores.read_choice(chain, {"A": "x", "B": "y"}) is None
    )  # the public rule alone cannot read a chain
    assert (
        scores.find_answer(chain, "choice") == scores.find_answer(chain, "caption") == "B"
    )
    torn = render(Chain([("noise", 0.5)], "A veil", "a cat", "a cat sits"))
    assert (
        scores.find_answer(torn, "choice") is None
        and scores.find_answer(torn, "open") == "a cat sits"
    )
    assert scores.find_answer("just B", "choice") == "just B"


def test_proxies_by_hand():
    assert (
        scores.rouge_l("a dog runs fast", "the dog runs") == pytest.approx(2 * 2 / 7)
        and scores.rouge_l("", "x") == 0
    )
    assert scores.rouge_l("c a b", "a b c") == pytest.approx(2 * 2 / 6)
    row = {"form": "open", "answer": "No"}
    assert scores.score_benchmark("no, it is not", row) == (
        1,
        True,
    ) and scores.score_benchmark("nothing", row) == (0, True)
    assert scores.score_benchmark(" ", row) == (0, False)
    row = {"form": "caption", "references": ["a dog", "two cats"], "answer": "a dog"}
    assert scores.score_benchmark("a dog", row)[0] == pytest.approx((1 + 0) / 2)


def test_the_report_of_r_bench(tmp_path):
    """Nine cells by its own strength, proxies marked, nothing said of damage that is not known."""
    jobs = predictions.make_jobs(
        read(write_r_bench(tmp_path, R_BENCH), None, tmp_path), [0.5], 0
    )
    assert [(job["shown"], job["degradations"], job["strength"]) for job in jobs] == [
        ("as is", None, "low"),
        ("as is", None, "mid"),
        ("as is", None, "high"),
    ]
    said = [
        render(Chain([("noise", 0.5)], "i", "r", "c", a))
        for a in ("Q", "a caf\u00e9 \u94f6\u884c", "a dog runs")
    ]
    rows = [
        json.loads(json.dumps(job)) | answer(text, plain=False)
        for job, text in zip(jobs, said)
    ]
    found = report.of_model(rows)
    table = found["table_1"]
    assert (
        table["choice low"]["value"] == 0
        and table["choice low"]["unparsed"] == 1
        and "by" not in table["choice low"]
    )
    assert (
        table["open mid"]["value"] == 1
        and table["open mid"]["by"] == "proxy" == table["overall"]["by"]
    )
    caption = (1 + 2 * 2 / 6) / 5  # of "a man's dog" two words of three
    assert table["caption high"]["value"] == pytest.approx(caption)
    assert (
        table["overall"]["value"]
        == table["per question"]["value"]
        == pytest.approx((0 + 1 + caption) / 3)
        and table["overall"]["cells"] == 3
    )
    assert (
        found["summary"]["r_deg"]["value"] is None
        and found["summary"]["well_formed"]["value"] == 1
        and "figure_6" not in found
    )
    assert found["categories"]["jpeg"]["n"] == 1 and found["table_2"] == {}
    text = report.as_text({"a": found, "b": found | {"versus": metrics.versus(rows, rows)}})
    assert (
        "1.000 [0.207, 1.000] n 1, proxy" in text
        and "+0.000 [+0.000, +0.000] n 1, +0 -0, p 1" in text
        and "Table 2" not in text
    )


# ---------------------------------------------------------------- evaluate.py, damaged copies


def test_evaluate_on_a_tsv_and_its_damaged_copy(
    tsv, tmp_path, checkpoint, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    ask = [
        "--models",
        f"base={checkpoint}",
        f"rl={checkpoint}",
        "--benchmark",
        str(tsv),
        "--levels",
        "0.25",
        "1",
        "--max-new-tokens",
        "3",
    ]
    evaluate.main(ask)
    text = capsys.readouterr().out
    assert all(
        part in text
        for part in (
            "Table 2",
            "| 25% ",
            "mean of categories",
            "questions against base",
            "McNemar",
            "The same for open",
            "proxy",
        )
    )
    assert "Table 1" not in text
    rows = {
        row["key"]: row
        for row in predictions.read_predictions(tmp_path / "runs/eval-MMTest/rl")
    }
    assert len(rows) == 15 and {row["shown"] for row in rows.values()} == {
        "clean",
        "0.25",
        "1",
    }
    assert (
        rows["3 clean"]["answer"] == "B"
        and rows["3 clean"]["letters"] == "AB"
        and rows["3 clean"]["benchmark"] == "MMTest"
    )
    files = damage_tsv(tsv, tmp_path / "hurt.tsv", [0.25, 1])
    assert [f.name for f in files] == ["hurt_25.tsv", "hurt_100.tsv"] and not list(
        tmp_path.glob("*.tmp")
    )
    hurt = read(files[1], None, tmp_path / "cache")
    for row in hurt:  # read back as damaged, and not damaged once more
        [damage] = row["degradations"]
        assert damage == tuple(rows[f"{row['number']} 1"]["degradations"][0].values())
        assert row["seed"] == str(rows[f"{row['number']} 1"]["damage_seed"])
    [job] = predictions.make_jobs(hurt[:1], [1.0], 0)
    assert (job["shown"], job["damage_seed"], job["seed"]) == (
        "as is",
        None,
        hurt[0]["seed"],
    )
    level = report.of_model([job | answer("B")])["table_1"]["choice medium"]
    assert (level["value"], level["n"]) == (1, 1)
    for row, (key, source) in zip(
        hurt, (("3 1", 0), ("4 1", 0), ("5 1", 1), ("6 1", 1), ("7 1", 2))
    ):
        [damage] = rows[key]["degradations"]
        shown = np.asarray(predictions.pictures_of(rows[key])[0].open())
        assert np.array_equal(
            np.asarray(records.open_image(row["image"])), shown
        )  # the same damage, on the fly or written
        if source == 0:
            clean = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
            assert (
                np.array_equal(
                    shown,
                    degrade(clean, [tuple(damage.values())], rows[key]["damage_seed"]),
                )
                and damage["intensity"] == 1
            )
    written = [row for _, row in rows_of(files[1])]
    assert (
        written[0]["degradation"] == rows["3 1"]["degradations"][0]["type"]
        and written[0]["intensity"] == "1"
        and written[1]["image"] == "0"
    )
    assert (
        written[0]["damage_seed"] == str(rows["3 1"]["damage_seed"])
        and written[0]["question"] == ROWS[0]["question"]
    )


def test_damage_that_fails_leaves_nothing(tsv, tmp_path):
    twice, bad, cut = tmp_path / "twice.tsv", tmp_path / "bad.tsv", tmp_path / "cut.tsv"
    damage_tsv(tsv, tmp_path / "hurt.tsv", [1.0])
    write_tsv(bad, [ROWS[0], ROWS[1] | {"image": "a" * 101}])
    cut.write_bytes(tsv.read_bytes()[:-40])
    for source, message in (
        (
            tmp_path / "hurt.tsv",
            "hurt.tsv:3: a column degradation: this is a damaged copy already",
        ),
        (bad, "bad.tsv:4: image is not base64"),
        (cut, "cut.tsv:7: has not the"),
    ):
        with pytest.raises(records.DataError, match=message):
            damage_tsv(source, twice, [0.5, 1.0])
    assert not list(tmp_path.glob("twice*")) and not list(tmp_path.glob("*.tmp"))


def test_damage_with_skip_bad_leaves_rows_out_and_names_them(tsv, tmp_path, capsys):
    bad, hurt = tmp_path / "bad.tsv", tmp_path / "hurt.tsv"
    write_tsv(bad, [ROWS[0], ROWS[-1] | {"image": "a" * 101}, ROWS[-1] | {"index": 11}])
    ask = ["damage", str(bad), str(hurt), "--levels", "1"]
    with pytest.raises(records.DataError, match="bad.tsv:4: image is not base64"):
        benchmarks.main(ask)
    assert not hurt.exists()
    benchmarks.main([*ask, "--skip-bad"])
    assert f"left out: {bad}:4: image is not base64" in capsys.readouterr().out
    assert [row["index"] for _, row in rows_of(hurt)] == [str(ROWS[0]["index"]), "11"]
    write_tsv(bad, [ROWS[-1] | {"image": ""}])
    with pytest.raises(records.DataError, match="bad.tsv: holds no row that can be used"):
        benchmarks.main([*ask, "--skip-bad"])


def test_damage_uses_all_cores(tsv, tmp_path, monkeypatch):
    threads, draw = set(), evaluation_tsv.draw_damage

    def drawn(*arguments):
        threads.add(threading.get_ident())
        time.sleep(0.2)
        return draw(*arguments)

    monkeypatch.setattr(evaluation_tsv, "draw_damage", drawn)
    damage_tsv(tsv, tmp_path / "hurt.tsv", [1.0])
    assert len(threads) > 1 or os.cpu_count() == 1


def test_the_damage_command(tsv, tmp_path, capsys):
    ask = ["damage", str(tsv), str(tmp_path / "out.tsv"), "--levels", "0.5"]
    benchmarks.main(ask)
    first = (tmp_path / "out.tsv").read_bytes()
    benchmarks.main(ask)
    assert (
        tmp_path / "out.tsv"
    ).read_bytes() == first and "written: " in capsys.readouterr().out
    benchmarks.main([*ask, "--seed", "1"])
    assert (tmp_path / "out.tsv").read_bytes() != first
    for source, target, levels in (
        (tsv, tsv, ["1"]),
        (tsv, tmp_path / "o.tsv", ["1", "1"]),
        (tmp_path / "gone.tsv", tmp_path / "o.tsv", ["1"]),
    ):
        with pytest.raises(SystemExit, match="tsv"):
            benchmarks.main(["damage", str(source), str(target), "--levels", *levels])


# ---------------------------------------------------------------- the judge


class Judge(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(
            (
                self.path,
                self.headers["Authorization"],
                request["model"],
                request["messages"][0]["content"],
            )
        )
        reply = self.server.reply(request["messages"][0]["content"])
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        self.send_response(status if reply is not None else 401)
        if status == 429:
            self.send_header("Retry-After", self.server.wait)
        self.end_headers()
        self.wfile.write(
            json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        )

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    server = HTTPServer(("127.0.0.1", 0), Judge)
    server.statuses = []
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_r_benchs_own_votes(judge, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    jobs = predictions.make_jobs(
        read(write_r_bench(tmp_path, R_BENCH), None, tmp_path), None, 0
    )
    rows = [job | answer(text) for job, text in zip(jobs, ("B", "a caf\u00e9", "a dog"))]
    judge.reply = lambda text: (
        "1."
        if "Options" in text
        else ("vote: 2" if "a dog runs" in text else "1")
        if "reference" in text
        else "2"
    )
    votes.vote(rows, judge.url + "/", "gpt-3.5-turbo", tmp_path / "votes.jsonl")
    assert [row["votes"] for row in rows] == [[1] * 5, [2] * 5, [2, 1, 1, 1, 1]]
    assert [metrics.judge(row)["score"] for row in rows] == [
        1,
        1,
        6 / 10,
    ] and report.of_model(rows)["table_1"]["overall"]["by"] == "votes"
    assert len(judge.asked) == 15 and judge.asked[0][:3] == (
        "/v1/chat/completions",
        "Bearer secret-key",
        "gpt-3.5-turbo",
    )
    votes.vote(rows, judge.url, "gpt-3.5-turbo", tmp_path / "votes.jsonl")
    assert len(judge.asked) == 15  # every vote is on disk
    judge.reply = lambda text: "cannot say: 1 or 2"
    again = [
        {key: value for key, value in rows[1].items() if key != "votes"} | answer("tea"),
        rows[0] | answer("<TYPE>torn"),
    ]
    votes.vote(again, judge.url, "gpt-3.5-turbo", tmp_path / "votes.jsonl")
    assert (
        again[0]["votes"] == [None] * 5 and len(judge.asked) == 25
    )  # asked once more each, then unread
    assert [
        (metrics.judge(row)["score"], metrics.judge(row)["parsed"]) for row in again
    ] == [(0, False)] * 2
    judge.reply = lambda text: None
    with pytest.raises(SystemExit, match="401.*kept") as error:
        votes.vote(
            [rows[1] | answer("other")],
            judge.url,
            "gpt-3.5-turbo",
            tmp_path / "votes.jsonl",
        )
    with pytest.raises(SystemExit, match="expected an address"):
        votes.vote(rows, "file:///etc/passwd", "m", tmp_path / "votes.jsonl")
    said = capsys.readouterr()
    assert (
        "secret-key"
        not in str(error.value)
        + said.out
        + said.err
        + (tmp_path / "votes.jsonl").read_text()
    )


def test_r_benchs_majority_of_votes():
    """Its notebook: int(sum / 5 + 0.5) of a choice; the others are means."""
    assert [scores.score_votes([1] * k + [0] * (5 - k), 1)[0] for k in range(6)] == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]
    assert scores.score_votes([2, 1, 0, 0, 0], 2) == (0.3, True)
    assert scores.score_votes([1, 1, None, None, 1], 1) == (1, False)
    assert scores.score_votes([], 2) == (0, False)


def test_a_busy_judge_is_waited_for_and_one_lost_vote_ends_nothing(
    judge, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    jobs = predictions.make_jobs(
        read(write_r_bench(tmp_path, R_BENCH), None, tmp_path), None, 0
    )
    rows = [job | answer("B") for job in jobs[:2]]
    judge.reply = lambda text: "1"
    judge.statuses = [429, 429, 429] + [200] * 4 + [400]  # the eighth is refused for good
    judge.wait = "0.05"
    votes.vote(rows, judge.url, "m", tmp_path / "votes.jsonl")
    assert sum(row["votes"].count(1) for row in rows) == 9
    assert "1 votes could not be had; run again" in capsys.readouterr().out
    votes.vote(rows, judge.url, "m", tmp_path / "votes.jsonl")
    assert [row["votes"] for row in rows] == [[1] * 5] * 2
    judge.statuses = [400] * 1000
    more = [row | {"response": f"another {i}"} for i, row in enumerate(rows * 10)]
    with pytest.raises(SystemExit, match="20 requests in a row failed.*Votes are kept"):
        votes.vote(more, judge.url, "m", tmp_path / "votes.jsonl")
    assert len(judge.asked) < 60


def test_a_chain_model_is_asked_for_its_chain_and_a_plain_one_for_the_choice(tsv, tmp_path):
    job = predictions.make_jobs(read(tsv, None, tmp_path / "cache"), None, 0)[0]
    assert (
        job["key"] == "3 clean"
        and job["question"].endswith(REQUEST)
        and build_prompt(job["question"]).startswith(job["question"])
    )
    for response, plain in (
        ("The answer is B", True),
        (render(Chain([], "i", "r", "c", "B")), False),
        (render(Chain([], "i", "r", "c", 1)), False),
    ):
        assert metrics.judge(job | answer(response, plain))["score"] == 1
