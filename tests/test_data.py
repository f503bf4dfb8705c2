"""Records on disk: every form is read, errors name file and line, shares stay apart."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

import degrade
import train_grpo
import train_sft
from degrade import Degradation
from rr1 import data, records, runtime
from rr1.answers import short_answer
from rr1.records import DataError, open_image, read

CHAIN = (
    "<TYPE>noise(0.20)<TYPE_END>\n<INFLUENCE>grain<INFLUENCE_END>\n"
    "<REASONING>a car<REASONING_END>\n"
    "<CONCLUSION>it is a car<CONCLUSION_END>\n<ANSWER>1<ANSWER_END>"
)


def line(**changes):
    """A record in the released form; a key set to None is left out."""
    record = {
        "id": "7",
        "image": "images/7.png",
        "conversations": [
            {"from": "human", "value": "<image>what is it?\n0. cat 1. car"},
            {"from": "gpt", "value": CHAIN},
        ],
    } | changes
    return json.dumps({key: value for key, value in record.items() if value is not None})


def turns(*said):
    """Human and gpt in turn."""
    speakers = ["human", "gpt"] * len(said)
    return [{"from": who, "value": text} for who, text in zip(speakers, said)]


def write(folder, *lines):
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


# ---------------------------------------------------------------- reading


def test_a_released_record(tmp_path):
    (record,) = read(write(tmp_path, line()))
    assert record["image"] == str(tmp_path / "images/7.png") and record["id"] == "7"
    assert (
        record["question"] == "what is it?\n0. cat 1. car" and record["response"] == CHAIN
    )
    assert (
        record["chain"].degradations
        == record["degradations"]
        == [Degradation("noise", 0.2)]
    )
    assert record["answer"] == "1" and record["choices"] is None
    assert record["where"].endswith("train.jsonl:1")


def test_our_own_keys_and_another_image_folder(tmp_path):
    known = [{"type": "noise", "intensity": 0.25}]
    (record,) = read(
        write(
            tmp_path,
            "",
            line(
                degradations=known,
                choices=["cat", "car"],
                answer="car",
                clean_image="clean/7.png",
                form="choice",
            ),
        ),
        image_folder=tmp_path / "elsewhere",
    )
    assert (
        record["degradations"] == [Degradation("noise", 0.25)]
        and record["choices"] == ["cat", "car"]
        and record["answer"] == "car"
    )
    assert record["image"] == str(tmp_path / "elsewhere/images/7.png") and record[
        "clean_image"
    ] == str(tmp_path / "elsewhere/clean/7.png")
    assert record["form"] == "choice" and record["where"].endswith("train.jsonl:2")


def test_one_picture_in_a_list_and_a_number_for_an_answer(tmp_path):
    turns = [{"from": "human", "value": "<image>how many?"}, {"from": "gpt", "value": 3}]
    (record,) = read(write(tmp_path, line(image=["images/7.png"], conversations=turns)))
    assert record["image"] == str(tmp_path / "images/7.png") and record["response"] == "3"


@pytest.mark.parametrize(
    "bad, message",
    [
        ('{"id": 7,', "not JSON"),
        ("[1, 2]", "expected an object"),
        ("7", "expected an object"),
        ("[" * 100000, "not JSON"),
        (line(image=None), "'image'.*missing"),
        (line(conversations=None), "'conversations'.*missing"),
        (line(conversations=[{"from": "human", "value": "why?"}]), "'gpt'.*missing"),
        (line(conversations=[{"role": "user", "content": "why?"}]), "'gpt'.*missing"),
        (
            line(conversations=[{"from": "human", "text": "why?"}]),
            "a turn of 'human' says 'None'",
        ),
        (line(conversations=[{"from": "tool", "value": "7"}]), "a turn of 'tool'"),
        (line(conversations=[{"from": "human", "value": "a"}] * 2), "a turn of 'human'"),
        (
            line(conversations=[{"from": "human", "value": [{"type": "text"}]}]),
            "field 'text' is missing",
        ),
        (
            line(
                conversations=[
                    {"from": "human", "value": "<image><image>a"},
                    {"from": "gpt", "value": "b"},
                ]
            ),
            "2 times <image>",
        ),
        (line(conversations=[7]), "'int' object"),
        (line(image="../secret.png"), "out of the image folder"),
        (line(image="a/../../secret.png"), "out of the image folder"),
        (line(image="/etc/secret.png"), "out of the image folder"),
        (line(clean_image="../secret.png"), "out of the image folder"),
        (line(image=7), "image is 7; expected one path"),
        (line(image=[]), r"image is \[\]; expected one path"),
        (line(degradations=[{"type": "noise"}]), "degradations"),
        (line(degradations=[{"name": "noise", "s": 0.2}]), "degradations"),
        (line(degradations=[{"type": "noise", "intensity": 47}]), r"a number in \[0, 1\]"),
        (line(degradations=[{"type": "noise", "intensity": "NaN"}]), "degradations"),
        (line(degradations=[7]), "degradations"),
        (line(choices="dog"), "choices is 'dog'; expected a list"),
        (line(conversations=turns("<image>a <|image_pad|>", "b")), "image_pad"),
        (line(conversations=turns("<image>a", "b <|image_pad|>")), "image_pad"),
        (line(conversations=turns("<image>a", {"text": "b"})), "a turn of 'gpt' says"),
        (line(degradations="noise"), "degradations"),
        (line(clean_image=7), "image is 7; expected one path"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, bad, message):
    with pytest.raises(DataError, match=rf"train\.jsonl:2: .*{message}"):
        read(write(tmp_path, line(), bad, line()))


def llama_factory(i, form):
    keys, roles = (
        (("role", "content"), ("user", "assistant"))
        if form == "messages"
        else (("from", "value"), ("human", "gpt"))
    )
    said = ("<image>Was f\u00fcr ein [Auto], {blau}?" + " \u2713" * i, CHAIN)
    turns = [dict(zip(keys, turn)) for turn in (("system", "be brief"), *zip(roles, said))]
    return {form: turns, "images": [f"{i}.png"]}


@pytest.mark.parametrize("indent", [None, 1, "lines"])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_llama_factory(tmp_path, form, indent):
    """A JSON list or lines, one line or pretty, in letters of two and three bytes."""
    made = [llama_factory(i, form) for i in range(9)]
    text = (
        "\n".join(map(json.dumps, made))
        if indent == "lines"
        else json.dumps(made, ensure_ascii=False, indent=indent)
    )
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8-sig" if indent == 1 else "utf-8")
    found = read(path)
    assert len(found) == 9 and [r["number"] for r in found] == list(range(1, 10))
    for i in (8, 0, 4, -1):
        i %= 9
        assert (
            found[i]["question"] == "Was f\u00fcr ein [Auto], {blau}?" + " \u2713" * i
            and found[i]["response"] == CHAIN
        )
        assert found[i]["image"] == str(tmp_path / f"{i}.png")
    assert len({r["id"] for r in found}) == 9
    assert found[3]["where"] == (f"{path}:4" if indent == "lines" else f"{path}, item 4")


def test_of_several_turns_the_last_one_is_asked(tmp_path):
    """What was said before stands in front of it, as in LLaMA-Factory's mllm_demo.json."""
    said = turns("<image>Who are they?", "Kane and Gretzka.", "What are they doing?", CHAIN)
    [record] = read(write(tmp_path, line(conversations=said)))
    assert record["question"] == "Who are they?\nKane and Gretzka.\nWhat are they doing?"
    assert record["response"] == CHAIN and record["answer"] == "1"
    later = turns("<image>who?", "a man", "and here?<image>", CHAIN)
    [record] = read(write(tmp_path, line(image=["a.png", "b.png"], conversations=later)))
    assert record["question"] == "<image>who?\na man\nand here?<image>"


def test_content_in_parts(tmp_path):
    """As TRL and OpenAI's messages have it; the pictures beside them or in them."""
    text = {"type": "text", "text": "what is it?"}
    answer = [{"type": "text", "text": CHAIN}]
    for picture, more in (
        ({"type": "image"}, {"image": "7.png"}),
        ({"type": "image", "image": "7.png"}, {}),
    ):
        said = [("system", "be brief"), ("user", [picture, text]), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in said]
        [record] = read(write(tmp_path, json.dumps({"messages": messages} | more)))
        assert record["question"] == "what is it?" and record["response"] == CHAIN
        assert record["image"] == str(tmp_path / "7.png")


def test_a_record_without_a_chain(tmp_path):
    """For reinforcement learning: the damage, the length to aim for, an answer if there is one."""
    known = [{"type": "JPEG compression", "intensity": 0.257}]
    human = [{"from": "human", "value": "<image>what is it?"}]
    rl = line(conversations=human, degradations=known, answer="car", length=31)
    [record] = read(write(tmp_path, rl))
    assert record["response"] is None and record["chain"].conclusion is None
    assert record["degradations"] == [("compression", 0.26)] == record["chain"].degradations
    assert (record["answer"], record["length"]) == ("car", 31)
    records.check_truth(record, ["deg", "len", "accuracy"])
    [record] = read(write(tmp_path, line(conversations=human, degradations=[])))
    records.check_truth(record, ["deg"])  # a clean picture
    with pytest.raises(DataError, match=r"train\.jsonl:1: the length to aim for .*Eq. 7"):
        records.check_truth(record, ["deg", "len"])


@pytest.mark.parametrize("length", [0, -3, "31", [31]])
def test_a_length_that_is_none_is_a_bad_record(tmp_path, length):
    [record] = read(write(tmp_path, line(length=length)))
    records.check_truth(record, ["deg"])
    with pytest.raises(DataError, match=r"train\.jsonl:1: the length to aim for is"):
        records.check_truth(record, ["len"])


TORN = CHAIN.replace("<TYPE_END>", "</TYPE>")


@pytest.mark.parametrize(
    "response, known, rewards, message",
    [
        (CHAIN, None, ["deg", "len"], None),
        (CHAIN, [("noise", 0.2)], ["deg", "len"], None),
        (CHAIN, [("gaussian noise", 0.204)], ["deg_released"], None),
        (TORN, [("noise", 0.2)], ["deg", "len"], None),  # one statement can be read
        (CHAIN.replace("noise(0.20)", ""), None, ["deg", "deg_pairwise", "len"], None),
        ("2", None, ["accuracy", "format"], None),
        ("2", [("noise", 0.2)], ["deg"], None),
        ("2", None, ["deg"], "what damaged the picture cannot be read"),
        (TORN, None, ["deg"], "what damaged the picture cannot be read"),
        (CHAIN.replace("(0.20)", "(a lot)"), None, ["deg"], "cannot be read"),
        (CHAIN.replace("0.20", "47"), None, ["deg_released"], r"intensities in \[0, 1\]"),
        (CHAIN, [("noise", 0.4)], ["deg"], "the true chain says .*correct one"),
        (CHAIN, [("darkness", 0.2)], ["deg"], "the true chain says .*correct one"),
        (CHAIN, [], ["deg_pairwise"], "the true chain says .*correct one"),
        ("2", [("noise", 0.2)], ["len"], "the length to aim for is None"),
    ],
)
def test_a_reward_needs_a_truth_that_can_be_read(
    tmp_path, response, known, rewards, message
):
    if known is not None:
        known = [{"type": tau, "intensity": s} for tau, s in known]
    said = turns("<image>what?", response)
    [record] = read(write(tmp_path, line(conversations=said, degradations=known)))
    if message is None:
        records.check_truth(record, rewards)
        return
    with pytest.raises(DataError, match=rf"train\.jsonl:1: .*{message}"):
        records.check_truth(record, rewards)


@pytest.mark.parametrize("form", ["parquet", "parquet folder", "saved", "saved splits"])
def test_a_hugging_face_data_set_is_read_as_it_is(tmp_path, monkeypatch, form):
    datasets = pytest.importorskip("datasets", reason="an extra: pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    picture = io.BytesIO()
    Image.new("RGB", (8, 6), (9, 8, 7)).save(picture, "png")
    inside = {"bytes": picture.getvalue(), "path": "some.png"}
    rows = [
        {"images": [inside] * (i + 1), "messages": said(i), "answer": None}
        for i in range(2)
    ]
    features = datasets.Features(
        images=[datasets.Image()],
        messages=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        answer=datasets.Value("string"),
    )
    made = datasets.Dataset.from_list(rows, features=features)
    path = tmp_path / ("set.parquet" if form == "parquet" else "set")
    if form == "parquet":
        made.to_parquet(str(path))
    elif form == "parquet folder":
        (path / "data").mkdir(parents=True)
        made.to_parquet(str(path / "data" / "train-00000-of-00001.parquet"))
        made.select([0]).to_parquet(str(path / "data" / "test-00000-of-00001.parquet"))
    elif form == "saved":
        made.save_to_disk(str(path))
    else:
        datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk(str(path))
    for _ in range(2):
        one, two = read(path)
        assert one["question"] == "what is it?" and one["response"] == CHAIN
        assert two["question"] == "which one?" and two["answer"] == "1"
        assert one["image"] == two["image"][0] == two["image"][1]
        assert open_image(one["image"]).getpixel((0, 0)) == (9, 8, 7)
        assert one["where"] == f"{path}, item 1"
    assert len(list(tmp_path.glob("*.pictures/*"))) == 1
    broken = tmp_path / "nothing"
    broken.mkdir()
    with pytest.raises(SystemExit, match="--data .*nothing: cannot be read as a data set"):
        read(broken)


def said(i):
    question = ["<image>what is it?", "<image><image>which one?"][i]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": CHAIN}]


def test_a_parquet_file_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        SystemExit, match="x.parquet: reading this needs `pip install datasets`"
    ):
        read(tmp_path / "x.parquet")


def test_a_broken_list_is_named_by_line_and_item(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[\n" + line() + ",\n" + line()[:-9])
    with pytest.raises(DataError, match=r"x\.json: not JSON .*line 3 column"):
        read(path)
    path.write_text("[\n" + line() + ",\n" + line(image=None) + "]")
    with pytest.raises(DataError, match=r"x\.json, item 2: field 'image' is missing"):
        read(path)
    assert len(read(path, skip_bad=True)) == 1


def test_nothing_may_follow_a_list(tmp_path):
    """`cat a.json b.json` gives two lists: reading the first alone would halve the data set."""
    for more in (f"[{line()}]", "junk", line()):
        path = tmp_path / "x.json"
        path.write_text(f"[{line()}]\n{more}\n")
        with pytest.raises(
            DataError, match=r"x\.json: not JSON .*Extra data: line 2 column 1"
        ):
            read(path)


def test_a_fault_is_named_by_its_column(tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl:1: not JSON .*line 1 column 15"):
        read(write(tmp_path, '{"image": "a",'))


def test_a_okvqa_beside_a_coco_folder(tmp_path):
    """The fields of aokvqa_v1p0_train.json, and of the test split, which has no answers."""
    item = {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": ["ride"] * 10,
        "difficult_direct_answer": False,
        "rationales": ["A train would not be on the street.", "b", "c"],
    }
    test = {
        key: item[key] for key in ("image_id", "question_id", "question", "choices")
    } | {"split": "test"}
    (tmp_path / "a.json").write_text(
        json.dumps([item, test, item | {"image": "own/7.jpg"}])
    )
    train, test, own = read(tmp_path / "a.json", tmp_path / "coco")
    assert (
        train["image"]
        == train["clean_image"]
        == str(tmp_path / "coco/train2017/000000299207.jpg")
    )
    assert (
        train["question"]
        == "What is the man by the bags awaiting?\n0. skateboarder 1. train 2. delivery 3. cab"
    )
    assert (train["id"], train["answer"], train["degradations"]) == (
        "22MexNkBPpdZGX6sxbxVBH",
        "3",
        [],
    )
    assert (
        train["chain"].reasoning == "A train would not be on the street."
        and train["chain"].answer == "3"
    )
    assert test["answer"] is None and "/test2017/" in test["image"]
    assert own["image"] == str(tmp_path / "coco/own/7.jpg")


def test_skip_bad_says_what_it_left_out(tmp_path):
    found = read(
        write(tmp_path, line(id="a"), "{broken", line(id="b", image=None), line(id="c")),
        skip_bad=True,
    )
    assert [r["id"] for r in found] == ["a", "c"] and [r["number"] for r in found] == [1, 4]
    assert [why.partition(": ")[0].rpartition(":")[2] for why in found.bad] == ["2", "3"]
    with pytest.raises(
        DataError, match="no records that can be used; the first: .*:1: not JSON"
    ):
        read(write(tmp_path, "{broken"), skip_bad=True)


def test_a_link_out_of_the_image_folder_is_refused(tmp_path):
    (tmp_path / "inside" / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "inside" / "images" / "7.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*out of the image folder"):
        read(write(tmp_path, line()), tmp_path / "inside")[0]
    (tmp_path / "linked").symlink_to(tmp_path / "inside")  # the folder itself may be a link
    (tmp_path / "inside" / "images" / "7.png").unlink()
    assert read(write(tmp_path, line()), tmp_path / "linked")[0]["image"] == str(
        tmp_path / "linked/images/7.png"
    )


def test_records_are_parsed_when_asked_for(tmp_path, monkeypatch):
    path, parsed = write(tmp_path, *[line(id=f"r{i}") for i in range(3000)]), []
    whole = records.parse
    monkeypatch.setattr(records, "parse", lambda text: parsed.append(1) or whole(text))
    found = read(path)
    rl = data.split(found, "rl")
    assert not parsed
    assert abs(len(rl) - 2250) < 100 and rl[7]["id"] == rl.ids[7] and len(parsed) == 1
    assert [r["id"] for r in found[5:8]] == ["r5", "r6", "r7"] and found[-1][
        "id"
    ] == "r2999"
    assert data.split(found[:40], "rl").ids == [id for id in rl.ids if int(id[1:]) < 40]


def test_no_file_and_no_records(tmp_path):
    with pytest.raises(SystemExit, match="nowhere.jsonl: no such file"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="holds no records"):
        read(write(tmp_path, "", ""))


# ---------------------------------------------------------------- shares and order


def share(tmp_path, ids, part):
    return set(data.split(read(write(tmp_path, *[line(id=id) for id in ids])), part).ids)


def test_a_quarter_for_sft_and_the_rest_for_rl(tmp_path):
    ids = [f"r{i}" for i in range(4000)]
    sft, rl = share(tmp_path, ids, "sft"), share(tmp_path, ids, "rl")
    assert not sft & rl and sft | rl == set(ids) == share(tmp_path, ids, "all")
    assert abs(len(sft) / 4000 - 0.25) < 0.03  # standard error .007
    assert sorted(sft)[:4] == ["r0", "r100", "r1002", "r1003"]  # the same on every machine


def test_a_record_never_changes_sides(tmp_path):
    ids = [f"r{i}" for i in range(400)]
    more = [f"new{i}" for i in range(300)] + ids[::-1]
    kept = set(ids) - {"r0"}
    assert share(tmp_path, more, "sft") & kept == share(tmp_path, ids, "sft") & kept
    assert share(tmp_path, more[:-1], "rl") & kept == share(tmp_path, ids, "rl") & kept


def test_records_without_an_id_do_not_change_sides_with_the_way_the_file_is_named(
    tmp_path, monkeypatch
):
    path = write(tmp_path, *[line(id=None)] * 40)
    monkeypatch.chdir(tmp_path)
    sft, rl = data.split(read(path), "sft"), data.split(read("train.jsonl"), "rl")
    assert len(sft) + len(rl) == 40 == len({*sft.ids, *rl.ids})


@pytest.mark.parametrize("n, size", [(10, 4), (10, 10), (3, 8), (1, 3), (7, 1)])
def test_every_record_once_an_epoch(n, size):
    steps = 3 * n  # a whole number of epochs
    row = [i for step in range(steps) for i in data.batch_indices(n, size, step, seed=5)]
    epochs = [tuple(row[start : start + n]) for start in range(0, len(row), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 7 or len(set(epochs)) > 1, "each epoch should have an order of its own"
    assert data.batch_indices(n, size, 2, seed=5) == row[2 * size : 3 * size]
    assert n < 7 or row != [
        i for step in range(steps) for i in data.batch_indices(n, size, step, seed=6)
    ]


def test_no_records_to_train_on_is_said(tmp_path):
    with pytest.raises(DataError, match="no records"):
        data.batch_indices(0, 4, 0, seed=0)


# ---------------------------------------------------------------- pictures


def test_open_image(tmp_path):
    Image.new("L", (5, 4), 9).save(tmp_path / "grey.png")
    image = open_image(tmp_path / "grey.png")
    assert (
        image.mode == "RGB" and image.size == (5, 4) and image.getpixel((0, 0)) == (9, 9, 9)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda p: None,
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"no picture at all"),
        lambda p: p.write_bytes(p.with_name("whole.png").read_bytes()[:200]),
    ],
)
def test_a_broken_picture_is_named(tmp_path, make):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    make(tmp_path / "broken.png")
    with pytest.raises(DataError, match=r"broken\.png: cannot be read as an image"):
        open_image(tmp_path / "broken.png")


RAMP = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)


def save_turned(path, orientation):
    image = Image.fromarray(np.arange(40 * 80 * 3).reshape(40, 80, 3).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_picture_is_what_a_person_sees(tmp_path, suffix):
    """Upright, and the same as `degrade.py` reads it, which has a reader of its own."""
    for orientation in range(1, 9):
        path = tmp_path / f"{orientation}.{suffix}"
        save_turned(path, orientation)
        image = open_image(path)
        assert image.size == ((80, 40) if orientation < 5 else (40, 80))
        difference = np.abs(np.asarray(image).astype(int) - degrade._read(path))
        assert difference.max() <= (2 if suffix == "jpg" else 0)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    path = tmp_path / f"ramp.{suffix}"
    Image.fromarray(RAMP).save(path)
    seen = np.asarray(open_image(path))
    assert seen.shape == (48, 64, 3) and (seen[..., 0] == RAMP >> 8).all()
    assert (seen == degrade._read(path)).all()


@pytest.mark.parametrize("largest", [1, 255, 65535, 1e6])
def test_floats_are_scaled_by_their_range(tmp_path, largest):
    Image.fromarray((RAMP / 65535 * largest).astype(np.float32)).save(tmp_path / "x.tif")
    seen = np.asarray(open_image(tmp_path / "x.tif"))
    assert np.abs(seen[..., 0] - RAMP / 257).max() <= 0.51
    assert largest > 65535 or (seen == degrade._read(tmp_path / "x.tif")).all()
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "i.tif")
    assert (np.asarray(open_image(tmp_path / "i.tif"))[..., 0] == RAMP >> 8).all()


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (4000, 3000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 5000
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**7)
    monkeypatch.setattr(Image.Image, "convert", None)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(DataError, match="4000 x 3000 pixels, more than"),
    ):
        open_image(tmp_path / "bomb.png")


def test_a_picture_that_cannot_be_used_is_named_by_line(tmp_path, processor):
    (tmp_path / "images").mkdir()
    (record,) = read(write(tmp_path, line()))
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: .*7\.png: cannot be read as an image"
    ):
        data.load_batch([record], processor)
    Image.new("RGB", (112, 224)).save(record["image"])
    grid = data.load_batch([record], processor).grid_thw
    assert processor.image_tokens(112, 224) == processor.visual_tokens(grid)[0]
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: .*more than --max-image-tokens 9"
    ):
        data.load_batch([record], processor, 9)
    Image.new("RGB", (1000, 2)).save(record["image"])
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*ratio"):
        data.load_batch([record], processor)


# ---------------------------------------------------------------- batches


def test_load_batch_reads_what_the_records_name(world_folder, processor):
    records = read(world_folder / "train.jsonl")[:3]
    batch = data.load_batch(records, processor)
    assert (
        batch.grid_thw.tolist() == [[1, 8, 8]] * 3 and batch.pixel_values.shape[0] == 3 * 64
    )
    for row, record in zip(batch.ids, records):
        assert row.count(processor.image_token_id) == 16
        assert record["question"] in processor.tokenizer.decode(row)
    assert torch.equal(
        batch[[1]].pixel_values, data.load_batch(records[1:2], processor).pixel_values
    )


def test_records_without_their_chains(world_folder, processor, tmp_path):
    """Table 3's "w/o Reasoning": the answer, of a caption the caption, to the question alone."""
    records = read(world_folder / "train.jsonl")[:20]
    for r in records:
        assert short_answer(r) == (
            r["caption"] if r["form"] == "caption" else r["answer"]
        ) and "<" not in short_answer(r)
    assert {r["form"] for r in records} == {"choice", "open", "caption"}
    batch = data.load_batch(records[:2], processor, plain=True)
    assert (
        batch.ids
        == [processor.prompt_ids(r["question"], [16]) for r in records[:2]]
        != data.load_batch(records[:2], processor).ids
    )
    (tmp_path / "images").mkdir()
    answered, silent = read(
        write(
            tmp_path,
            line(),
            line(
                conversations=[
                    {"from": "human", "value": "<image>what?"},
                    {"from": "gpt", "value": "a cat"},
                ]
            ),
        )
    )
    end = [processor.end_id]
    answer = processor.tokenizer(answered["chain"].answer)["input_ids"]
    assert data.response_ids(answered, processor, plain=True) == answer + end
    assert (
        data.response_ids(silent, processor)
        == processor.tokenizer("a cat")["input_ids"] + end
    )
    with pytest.raises(DataError, match=r"train\.jsonl:2: there is no answer"):
        data.response_ids(silent, processor, plain=True)
    for nothing in (None, ""):
        with pytest.raises(DataError, match="there is no answer"):
            data.response_ids(answered | {"answer": nothing}, processor, plain=True)
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*image_pad"):
        data.response_ids(answered | {"answer": "<|image_pad|>"}, processor, plain=True)


def test_the_length_to_aim_for(processor, tmp_path):
    human, known = turns("<image>what?"), [{"type": "noise", "intensity": 0.2}]
    lines = line(), line(length=31), line(conversations=human, degradations=known, length=7)
    chain, stated, without = read(write(tmp_path, *lines))
    tokens = len(processor.tokenizer(CHAIN)["input_ids"])
    assert data.true_length(chain, processor) == tokens  # without the end of turn
    assert (data.true_length(stated, processor), data.true_length(without, processor)) == (
        31,
        7,
    )
    with pytest.raises(DataError, match=r"train\.jsonl:3: there is no chain"):
        data.response_ids(without, processor)


def test_usable_raises_the_first_bad_record_or_leaves_it_out(tmp_path, capsys):
    said = turns("<image>what?", "a cat")
    found = read(
        write(tmp_path, line(id="a"), line(id="b", conversations=said), line(id="c"))
    )
    rt = runtime.Runtime()

    def check(record):
        records.check_truth(record, ["deg"])

    with pytest.raises(DataError, match=r"train\.jsonl:2: what damaged"):
        data.usable(found, check, rt)
    assert data.usable(found, check, rt, tmp_path).ids == ["a", "c"]
    assert "1 bad records are left out" in capsys.readouterr().out
    listed = json.loads((tmp_path / "skipped.json").read_text())
    assert (
        list(listed["records"]) == ["1"] and "train.jsonl:2: what" in listed["records"]["1"]
    )
    tried = []
    assert data.usable(found, tried.append, rt, tmp_path).ids == ["a", "c"]  # by the file
    assert not tried and data.usable(found[:1], check, rt).ids == ["a"]


def test_a_prompt_longer_than_the_model_is_named(processor, checkpoint, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "images" / "7.png")
    long = line(conversations=turns("<image>" + "what " * 200, CHAIN))
    found = list(read(write(tmp_path, line(), long)))
    batch = data.load_batch(found, processor)
    model = SimpleNamespace(config=AutoConfig.from_pretrained(checkpoint))
    first, second = map(len, batch.ids)
    model.config.text_config.max_position_embeddings = second + 10
    data.check_room(model, found, batch, [10, 10])
    with pytest.raises(
        DataError, match=rf"train\.jsonl:2: {second} tokens of prompt and 11 of"
    ):
        data.check_room(model, found, batch, [11, 11])


def test_errors_of_data_are_told_once_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from rr1 import records, runtime\n"
        "with records.one_line_errors():\n"
        "    runtime.setup()\n"
        "    print('begun')\n"
        "    raise records.DataError('train.jsonl:2: not JSON')\n"
    )
    root = Path(__file__).parent.parent
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        script,
    ]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr.count("train.jsonl:2: not JSON") == 1
    assert "begun" in done.stdout and re.search(r"exitcode *: 2 ", done.stderr)
    assert "DataError" not in done.stderr


def test_the_scripts_try_every_record_before_the_first_step(processor, tmp_path):
    """Their own checks, on records that were trained on without a word."""
    bad = [line(conversations=turns("<image>what?", "2")), line(), line()]
    found = read(write(tmp_path, *bad))
    rl = SimpleNamespace(rewards=["deg", "len"], skip_bad=False, max_image_tokens=0)
    sft = SimpleNamespace(plain=True, skip_bad=False, max_image_tokens=0)
    for script, config, problem in (
        (train_grpo, rl, "what damaged"),
        (train_sft, sft, "no answer"),
    ):
        script.check_record(config, processor, None, found[1])
        with pytest.raises(DataError, match=rf"train\.jsonl:1: .*{problem}"):
            script.check_record(config, processor, None, found[0])
        config.skip_bad = True  # then pictures are looked at, too
        with pytest.raises(DataError, match=r"train\.jsonl:2: .*7\.png"):
            script.check_record(config, processor, None, found[1])


def test_errors_of_data_are_one_line_once(capsys, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop, records.one_line_errors():
            raise DataError("train.jsonl:2: not JSON\n(a very\nlong story)")
        assert stop.value.code == 2
        assert capsys.readouterr().err == "train.jsonl:2: not JSON (a very long story)\n"
    assert slept == [5]  # the other ranks: torchrun ends them before they speak
    with pytest.raises(ZeroDivisionError), records.one_line_errors():
        raise ZeroDivisionError  # our own faults keep their traceback


def test_prefetch_keeps_the_order_and_works_ahead():
    made, main = [], threading.get_ident()

    def make(step):
        assert threading.get_ident() != main
        made.append(step)
        return step * 10

    stream = data.prefetch(make, range(3, 7))
    assert next(stream) == (3, 30)
    assert list(stream) == [(4, 40), (5, 50), (6, 60)] and made == [3, 4, 5, 6]
    assert list(data.prefetch(make, range(0))) == []


def test_prefetch_makes_at_most_one_ahead():
    made = Counter()
    stream = data.prefetch(lambda step: made.update([step]), range(10))
    next(stream), next(stream)
    stream.close()
    assert max(made) <= 3


def test_prefetch_by_several_threads_gives_the_same():
    """In order, however long each takes; as many at a time as there are workers."""
    together = threading.Barrier(3, timeout=30)

    def make(step):
        together.wait()
        time.sleep(0.02 * (9 - step))
        return step * 10

    found = list(data.prefetch(make, range(3, 9), workers=3))
    assert found == [(step, step * 10) for step in range(3, 9)]


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_raises_where_the_step_is_due(workers):
    def make(step):
        if step == 2:
            raise DataError("train.jsonl:2: broken")
        return step

    seen = []
    with pytest.raises(DataError, match="train.jsonl:2"):
        for step, _ in data.prefetch(make, range(5), workers):
            seen.append(step)
    assert seen == [0, 1]


# ---------------------------------------------------------------- what is imported


def test_reading_a_record_needs_no_plot_and_no_evaluation():
    code = "import sys, rr1.data; print(*sorted(sys.modules))"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
    )
    modules = done.stdout.split()
    assert "rr1.records" in modules
    unwanted = ("matplotlib", "rr1.evaluation", "rr1.u1", "rr1.annotate", "rr1.run_folder")
    assert not [name for name in modules if name.startswith(unwanted)]
