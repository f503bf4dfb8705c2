"""evaluate.py as a user runs it, on a small random model and a small drawn world."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import pytest
import torch
from PIL import Image

import evaluate
from rr1 import data, rollout, runtime, vlm
from rr1.chain import Chain, build_prompt, render
from rr1.evaluation import predictions
from rr1.records import DataError, read

ROOT = Path(__file__).resolve().parent.parent
RT = runtime.Runtime()
PLOTS = {"table_1.png", "table_2.png", "figure_6a_types.png", "figure_6b_length.png"}


@pytest.fixture(scope="module")
def arguments(checkpoint, world_folder):
    return [
        "--models",
        f"base={checkpoint}",
        f"sft={checkpoint}",
        "--data",
        str(world_folder / "test.jsonl"),
        "--max-new-tokens",
        "20",
        "--batch",
        "7",
        "--levels",
        "0.25",
        "1",
        "--temperature",
        "1",
    ]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """The folder of a whole evaluation."""
    out = tmp_path_factory.mktemp("eval")
    evaluate.main([*arguments, "--out", str(out)])
    return out


def lines(folder):
    return (folder / "predictions.jsonl").read_bytes().splitlines()


@pytest.fixture
def asked(monkeypatch):
    """Counts what is sampled and encoded."""
    counts = {"prompts": 0, "images": 0}
    sample, encode = rollout.sample_group, vlm.encode_images

    def counting_sample(model, prompts, *rest, **options):
        counts["prompts"] += len(prompts)
        return sample(model, prompts, *rest, **options)

    def counting_encode(model, pixels, grid):
        counts["images"] += len(grid)
        return encode(model, pixels, grid)

    monkeypatch.setattr(rollout, "sample_group", counting_sample)
    monkeypatch.setattr(vlm, "encode_images", counting_encode)
    return counts


# ---------------------------------------------------------------- what is asked


def test_jobs(world_folder):
    records = read(world_folder / "test.jsonl")
    jobs = predictions.make_jobs(records, [0.25, 1.0], seed=0)
    assert (
        len({job["key"] for job in jobs})
        == len(jobs)
        == len(records) + 3 * sum(r["form"] == "choice" for r in records)
    )
    assert predictions.make_jobs(records, None, 0) == [
        job for job in jobs if job["shown"] == "as is"
    ]
    by_picture = {}
    for job in jobs:
        if job["damage_seed"] is not None:
            [d] = job["degradations"]
            assert job["shown"] == f"{d['intensity']:g}" and "/clean/" in job["image"]
            by_picture.setdefault(job["image"], set()).add((d["type"], job["damage_seed"]))
        elif job["shown"] == "clean":
            assert job["degradations"] == [] and "/clean/" in job["image"]
    assert all(
        len(kinds) == 1 for kinds in by_picture.values()
    )  # every level shows the same damage, stronger
    assert len(set.union(*by_picture.values())) == len(by_picture)
    assert predictions.make_jobs(records, [0.25, 1.0], seed=1) != jobs


def test_records_in_the_released_form(tmp_path):
    """Without form, choices, clean picture or truth of our own: read from the chain."""
    chain = render(Chain([("jpeg compression", 0.5)], "i", "r", "c", 0))
    line = {
        "id": 1,
        "image": "a.jpg",
        "conversations": [
            {"from": "human", "value": "<image>what? 0. a 1. b"},
            {"from": "gpt", "value": chain},
        ],
    }
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    [job] = predictions.make_jobs(read(tmp_path / "x.jsonl"), [0.5], 0)
    assert (job["form"], job["answer"], job["question"]) == ("open", "0", "what? 0. a 1. b")
    assert job["degradations"] == [{"type": "compression", "intensity": 0.5}]


def test_every_row_is_what_the_model_says_alone(finished, checkpoint, world_folder):
    """Each in a batch of its own: nothing slipped to a neighbour in the batch of seven. The length
    to aim for is that of the record."""
    lengths = {}
    for record in map(json.loads, (world_folder / "test.jsonl").open()):
        lengths[record["conversations"][1]["value"]] = record["length"]
    model, processor = vlm.load(checkpoint)
    model.requires_grad_(False)
    for name in ("base", "sft"):
        rows = [json.loads(line) for line in lines(finished / name)]
        assert (
            len({row["response"] for row in rows}) > len(rows) / 2
        )  # so a slip would show
        for row in rows[::5]:
            text = row["question"] if name == "base" else build_prompt(row["question"])
            batch = data.collate(
                [text], [shown.open() for shown in predictions.pictures_of(row)], processor
            )
            [[r]] = rollout.sample_group(
                model,
                data.encode(model, batch),
                1,
                [crc32(f"0 {row['key']}".encode())],
                end_id=processor.end_id,
                max_new_tokens=20,
                banned=processor.banned_ids,
            )
            assert (
                row["response"] == processor.decode(r.ids)
                and row["truncated"] == r.truncated
            )
            assert row["length"] == len(r.ids) - (not r.truncated) and row["plain"] == (
                name == "base"
            )
            if row["shown"] == "as is":
                assert row["truth_length"] == lengths[row["true_response"]]


def test_greedy_answers_do_not_depend_on_batch_seed_or_workers(
    arguments, finished, tmp_path
):
    both = []
    for batch, seed, workers in (("5", "0", "0"), ("16", "1", "1")):
        evaluate.main(
            [
                *arguments,
                "--models",
                arguments[2],
                "--no-table-2",
                "--temperature",
                "0",
                "--limit",
                "8",
                "--batch",
                batch,
                "--seed",
                seed,
                "--workers",
                workers,
                "--out",
                str(tmp_path / batch),
            ]
        )
        both.append(lines(tmp_path / batch / "sft"))
    assert both[0] == both[1] != lines(finished / "sft")[:8] and len(both[0]) == 8


def test_a_picture_is_read_and_encoded_once(
    checkpoint, world_folder, tmp_path, asked, monkeypatch
):
    opened, open_image = [], predictions.open_image
    monkeypatch.setattr(
        predictions, "open_image", lambda path: opened.append(path) or open_image(path)
    )
    records = (world_folder / "test.jsonl").read_text().splitlines()[:4]
    (tmp_path / "x.jsonl").write_text(
        "\n".join(records[i] for i in (0, 1, 2, 3, 0, 1, 2, 3, 0))
    )
    evaluate.main(
        [
            "--model",
            checkpoint,
            "--data",
            str(tmp_path / "x.jsonl"),
            "--images",
            str(world_folder),
            "--no-table-2",
            "--max-new-tokens",
            "4",
            "--batch",
            "4",
            "--out",
            str(tmp_path),
        ]
    )
    assert asked == {"prompts": 9, "images": 4} and len(opened) == 4
    assert [json.loads(line)["key"] for line in lines(tmp_path / "model")] == [
        str(i) for i in range(1, 10)
    ]


def test_fewer_pixels_are_shown(checkpoint, world_folder, tmp_path, monkeypatch, capsys):
    """With --max-pixels, and where the checkpoint was saved with it; of a single --image too."""
    seen, make = [], vlm.make_prompt
    monkeypatch.setattr(
        vlm,
        "make_prompt",
        lambda model, ids, grid, features: (
            seen.append(len(features[0])),
            make(model, ids, grid, features),
        )[1],
    )
    monkeypatch.setattr(data, "make_prompt", vlm.make_prompt)
    shutil.copytree(checkpoint, tmp_path / "smaller")
    vlm.Processor.from_pretrained(checkpoint, max_pixels=6272).save_pretrained(
        tmp_path / "smaller"
    )
    asked = [
        "--data",
        str(world_folder / "test.jsonl"),
        "--limit",
        "3",
        "--no-table-2",
        "--max-new-tokens",
        "20",
        "--temperature",
        "1",
    ]
    for flags, tokens in (
        ([], 16),
        (["--max-pixels", "6272"], 4),
        (["--min-pixels", "20000", "--max-pixels", "50000"], 36),
    ):
        evaluate.main(
            ["--model", checkpoint, *asked, *flags, "--out", str(tmp_path / str(tokens))]
        )
        assert set(seen) == {tokens}
        seen.clear()
        evaluate.main(
            [
                "--model",
                checkpoint,
                "--image",
                str(next((world_folder / "images").iterdir())),
                "--question",
                "what?",
                *flags,
            ]
        )
        assert seen.pop() == tokens
    evaluate.main(
        ["--model", str(tmp_path / "smaller"), *asked, "--out", str(tmp_path / "saved")]
    )
    assert seen == [4] * 3 and lines(tmp_path / "saved" / "model") == lines(
        tmp_path / "4" / "model"
    ) != lines(tmp_path / "16" / "model")
    with pytest.raises(
        SystemExit,
        match="at least 784 and at most 500 pixels contradict each other: give both",
    ):
        evaluate.main(
            [
                "--model",
                checkpoint,
                *asked,
                "--max-pixels",
                "500",
                "--out",
                str(tmp_path / "none"),
            ]
        )


def test_a_picture_that_is_missing_is_named_by_file_and_line(checkpoint, tmp_path):
    with pytest.raises(
        DataError, match=r"one\.jsonl:1: .*a\.png: cannot be read as an image"
    ):
        evaluate.main(
            [
                "--model",
                checkpoint,
                "--data",
                str(one_record(tmp_path)),
                "--out",
                str(tmp_path / "out"),
            ]
        )


# ---------------------------------------------------------------- what comes of it


def test_the_report(finished, world_folder):
    records = read(world_folder / "test.jsonl")
    report = json.loads((finished / "report.json").read_text())
    hurt = sum(bool(r["degradations"]) for r in records)
    for name in ("base", "sft"):
        cells = report[name]["table_1"]
        assert (
            sum(
                e["n"]
                for key, e in cells.items()
                if key.split()[-1] in ("light", "medium", "strong")
            )
            == hurt
            == cells["per question"]["n"]
        )
        assert {e["n"] for e in report[name]["table_2"].values()} == {
            sum(r["form"] == "choice" for r in records)
        }
        assert list(report[name]["table_2"]) == ["clean", "0.25", "1"]
    assert "figure_6" not in report["base"] and sum(
        p["n"] for p in report["sft"]["figure_6"]["length"]
    ) == len(records)
    text = (finished / "report.txt").read_text()
    assert all(
        word in text
        for word in (
            "Table 1",
            "Table 2",
            "Figure 6",
            "overall",
            "per question",
            "| clean ",
            "| 100% ",
            "unread",
        )
    )
    assert PLOTS <= {path.name for path in finished.iterdir()}


def test_an_interrupted_evaluation_goes_on(finished, arguments, tmp_path, asked):
    whole = lines(finished / "sft")
    (tmp_path / "sft").mkdir()
    for name in ("meta.json", "predictions.jsonl"):
        (tmp_path / "sft" / name).write_bytes((finished / "sft" / name).read_bytes())
    cut = whole[:10] + whole[12:20]
    (tmp_path / "sft" / "predictions.jsonl").write_bytes(
        b"\n".join([*cut, whole[20][:40]])
    )  # killed in the middle of a line
    (tmp_path / "sft" / "predictions.1.jsonl").write_bytes(
        whole[11] + b"\n" + whole[3] + b"\n"
    )  # and another process's share
    evaluate.main([*arguments, "--models", arguments[2], "--out", str(tmp_path)])
    assert lines(tmp_path / "sft") == whole and asked["prompts"] == len(whole) - 19
    assert {path.name for path in tmp_path.glob("sft/*")} == {
        "meta.json",
        "predictions.jsonl",
    }
    evaluate.main([*arguments, "--models", arguments[2], "--out", str(tmp_path)])
    assert asked["prompts"] == len(whole) - 19  # nothing left to ask


def small_world(folder, world_folder, change=None):
    """The first six records of the world beside its pictures, changed line by line."""
    rows = [
        json.loads(line)
        for line in (world_folder / "test.jsonl").read_text().splitlines()[:6]
    ]
    rows = change(rows) if change else rows
    path = folder / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--data",
        str(path),
        "--images",
        str(world_folder),
        "--no-table-2",
        "--batch",
        "4",
    ]


def test_mending_one_record_asks_about_that_one_again(
    checkpoint, world_folder, tmp_path, asked
):
    ask = ["--model", checkpoint, "--max-new-tokens", "4", "--out", str(tmp_path / "out")]
    evaluate.main([*ask, *small_world(tmp_path, world_folder)])
    before = lines(tmp_path / "out/model")

    def mend(rows):
        rows[1]["conversations"][0]["value"] += " please"  # another question
        rows[5]["answer"] = "nothing of the kind"  # another truth of the same question
        return rows[1:]  # and all lines move up

    evaluate.main([*ask, *small_world(tmp_path, world_folder, mend)])
    rows = [json.loads(line) for line in lines(tmp_path / "out/model")]
    assert asked["prompts"] == 6 + 1 and [row["key"] for row in rows] == list("12345")
    assert (
        rows[0]["question"].endswith(" please")
        and rows[4]["answer"] == "nothing of the kind"
    )
    aside = (tmp_path / "out/model/set_aside.jsonl").read_bytes().splitlines()
    assert set(aside) == set(before[:2])
    evaluate.main([*ask, *small_world(tmp_path, world_folder)])  # what was asked once stays
    assert asked["prompts"] == 7 and lines(tmp_path / "out/model") == before


def test_another_picture_under_the_same_name_is_asked_about(
    checkpoint, world_folder, tmp_path, asked
):
    image = Image.new("RGB", (56, 56), "red")
    image.save(tmp_path / "a.png")
    ask = [
        "--model",
        checkpoint,
        "--data",
        str(one_record(tmp_path)),
        "--max-new-tokens",
        "4",
    ]
    evaluate.main([*ask, "--out", str(tmp_path / "out")])
    evaluate.main([*ask, "--out", str(tmp_path / "out")])
    assert asked["prompts"] == 1
    Image.linear_gradient("L").convert("RGB").resize((56, 56)).save(tmp_path / "a.png")
    evaluate.main([*ask, "--out", str(tmp_path / "out")])
    assert asked["prompts"] == 2


def test_errors_of_data_are_one_line(tmp_path):
    """And a record without a chain is asked about all the same, with the length to aim for."""
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    script = [sys.executable, str(ROOT / "evaluate.py"), "--model", "x"]
    for ask in (
        ["--data", str(tmp_path / "bad.jsonl")],
        ["--image", "gone.png", "--question", "?"],
    ):
        done = subprocess.run([*script, *ask], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 or "--image" in ask, done.stderr
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    line = {
        "image": "a.png",
        "length": 30,
        "degradations": [{"type": "noise", "intensity": 0.5}],
    }
    line |= {"conversations": [{"from": "human", "value": "q"}], "answer": "yes"}
    (tmp_path / "labels.jsonl").write_text(json.dumps(line) + "\n")
    [job] = predictions.make_jobs(read(tmp_path / "labels.jsonl"), None, 0)
    assert (job["true_response"], job["true_length"], job["answer"]) == (None, 30, "yes")


def test_skip_bad(checkpoint, world_folder, tmp_path, capfd):
    """A picture that is missing, one that is too long, and a line that is no record."""
    Image.new("RGB", (2000, 4)).save(tmp_path / "long.png")
    shutil.copytree(world_folder / "images", tmp_path / "images")

    def spoil(rows):
        rows[1]["image"] = "images/gone.png"
        rows[2]["image"] = "long.png"
        del rows[3]["conversations"]
        return rows

    ask = ["--model", checkpoint, *small_world(tmp_path, world_folder, spoil)]
    ask += [
        "--images",
        str(tmp_path),
        "--max-new-tokens",
        "4",
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(
        DataError, match=r"small\.jsonl:4: field 'conversations' is missing"
    ):
        evaluate.main(ask)
    for workers in ("0", "1"):
        evaluate.main([*ask, "--skip-bad", "--workers", workers])
        said = "".join(capfd.readouterr())
        assert "left out: " in said and "small.jsonl:4: field" in said
        assert "small.jsonl:2: " in said and "gone.png" in said
        assert "small.jsonl:3: " in said and "aspect ratio" in said
        keys = [json.loads(line)["key"] for line in lines(tmp_path / "out/model")]
        assert keys == ["1", "5", "6"]


def test_predictions_made_otherwise_are_not_mixed(
    finished, arguments, checkpoint, tmp_path
):
    before = lines(finished / "sft")
    for change, field in (
        (["--temperature", "0"], "temperature: was 1.0, now 0.0"),
        (["--max-new-tokens", "9"], "max_new_tokens"),
        (["--seed", "1"], "seed"),
        (["--plain", "sft"], "plain: was False, now True"),
        (["--max-pixels", "6272"], "max_pixels: was None, now 6272"),
    ):
        with pytest.raises(
            SystemExit,
            match=rf"(?s)sft was begun with other settings.*{field}.*another --out",
        ):
            evaluate.main(
                [*arguments, "--models", arguments[2], *change, "--out", str(finished)]
            )
    model, processor = vlm.load(checkpoint)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    for part in (model, processor):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="weights: was"):
        evaluate.main(
            [*arguments, "--models", f"sft={tmp_path / 'other'}", "--out", str(finished)]
        )
    assert lines(finished / "sft") == before


def test_score_only_needs_neither_model_nor_data(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlm, "load", None)
    monkeypatch.chdir(tmp_path)
    report = (finished / "report.json").read_bytes()
    (finished / "report.json").unlink()
    evaluate.main(
        ["--score-only", "--out", str(finished), "--models", "base=gone", "sft=gone"]
    )
    assert (finished / "report.json").read_bytes() == report
    assert (finished / "report.txt").read_text().strip() in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no predictions of x"):
        evaluate.main(["--score-only", "--out", str(finished), "--models", "x=gone"])


def test_which_models(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "sft").mkdir(parents=True)
    chosen = evaluate.choose_models(evaluate.Config(out="out", score_only=True), RT)
    assert list(chosen) == ["sft"]  # of the default, what is there
    said = capsys.readouterr().out
    assert "grpo is left out" in said and "base is left out" in said
    assert evaluate.choose_models(evaluate.Config(model="some/where"), RT) == {
        "model": "some/where"
    }
    for models in (["x"], ["a=1", "a=2"], ["../a=1"], ["=1"]):
        with pytest.raises(SystemExit, match="NAME=CHECKPOINT"):
            evaluate.choose_models(evaluate.Config(models=models), RT)
    with pytest.raises(SystemExit, match="--plain y: no such model"):
        evaluate.choose_models(evaluate.Config(models=["x=1"], plain=["y"]), RT)
    with pytest.raises(SystemExit, match="neither a checkpoint folder nor"):
        evaluate.main(
            [
                "--models",
                f"x={tmp_path / 'typo'}",
                "--data",
                str(one_record(tmp_path)),
                "--out",
                "out",
            ]
        )


def one_record(folder):
    line = {
        "id": 1,
        "image": "a.png",
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    }
    (folder / "one.jsonl").write_text(json.dumps(line))
    return folder / "one.jsonl"


def test_two_processes_write_the_same_file(finished, arguments, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "evaluate.py"), *arguments, "--out", str(tmp_path)],
            text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    for name in ("base", "sft"):
        assert lines(tmp_path / name) == lines(finished / name)
    assert (tmp_path / "report.txt").read_text() == (finished / "report.txt").read_text()
    assert "Table 1" in said[0] and "Table 1" not in said[1]


# ---------------------------------------------------------------- one picture


def test_one_picture(checkpoint, world_folder, capsys, monkeypatch):
    image = next((world_folder / "images").iterdir())
    ask = [
        "--image",
        str(image),
        "--model",
        checkpoint,
        "--question",
        "what color is the star?",
        "--choices",
        "red",
        "blue",
    ]
    evaluate.main(ask)
    said = capsys.readouterr().out
    assert (
        "112 x 112" in said
        and "what color is the star?\n0. red 1. blue" in said
        and "not well formed" in said
        and "(missing)" in said
    )
    chain = render(
        Chain(
            [("noise", 0.25), ("lens blur", 0.5)],
            "grain hides detail",
            "a star",
            "the star is blue",
            1,
        )
    )
    monkeypatch.setattr(vlm.Processor, "decode", lambda self, ids: chain)
    evaluate.main(ask)
    said = capsys.readouterr().out
    for part in (
        "D_d",
        "noise 0.25, lens blur 0.50",
        "Delta_d",
        "grain hides detail",
        "T_X",
        "a star",
        "Y_d",
        "the star is blue",
        "1 = blue",
        ", well formed",
    ):
        assert part in said
    with pytest.raises(SystemExit, match="--image needs --question"):
        evaluate.main(["--image", str(image)])
