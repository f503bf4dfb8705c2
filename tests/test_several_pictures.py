"""Several pictures: read, placed, scored as `transformers` scores them, trained on, evaluated."""

import copy
import json
import shutil
from zlib import crc32

import numpy as np
import pytest
import torch
from conftest import ordinary, random_model
from PIL import Image
from test_data import CHAIN, line, write
from test_train import SCRIPTS, SMALL
from test_vlm import exact_norm, random_responses
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

import evaluate
import train_sft
from rr1 import data, records, rollout, run_folder, vlm
from rr1.chain import build_prompt

both = pytest.mark.parametrize("script", SCRIPTS)
PAIR = [
    {"from": "human", "value": "<image>\n<image>what is it?\n0. cat 1. car"},
    {"from": "gpt", "value": CHAIN},
]
TEXTS = ["what is it?", "is <image> or <image> sharper, or <image>?", "which?"]
SIZES = [
    [(112, 112), (56, 112)],
    [(84, 56), (112, 56), (56, 56)],
    [(84, 84)],
]  # height, width; 16 + 8, 6 + 8 + 4, 9 visual tokens


def asked(text):
    return [{"from": "human", "value": text}, PAIR[1]]


def pictures():
    rng = np.random.default_rng(0)
    return [
        [
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            for size in sizes
        ]
        for sizes in SIZES
    ]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: None)


# ---------------------------------------------------------------- reading


def test_two_pictures(tmp_path):
    for form in (
        {"image": ["a.png", "b/c.png"]},
        {"image": None, "images": ["a.png", "b/c.png"]},
    ):
        (record,) = records.read(write(tmp_path, line(conversations=PAIR, **form)))
        assert (
            record["image"]
            == [str(tmp_path / "a.png"), str(tmp_path / "b/c.png")]
            == records.image_paths(record["image"])
        )
        assert (
            record["question"] == "what is it?\n0. cat 1. car"
            and record["response"] == CHAIN
        )


@pytest.mark.parametrize(
    "text, question",
    [
        (" <image> \n<image>\n Which?", "Which?"),
        ("A <image>, B <image>?", "A <image>, B <image>?"),
        ("<image>Sharper than <image>?", "<image>Sharper than <image>?"),
    ],
)
def test_marks_stay_where_they_say_something(tmp_path, text, question):
    (record,) = records.read(
        write(tmp_path, line(image=["a.png", "b.png"], conversations=asked(text)))
    )
    assert record["question"] == question


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"image": ["a.png", "b.png"]},
            "the question has 1 times <image>, image has 2 paths: write <image> once for each path",
        ),
        ({"conversations": PAIR}, "the question has 2 times <image>, image has 1 path: "),
        (
            {"image": ["a.png", "b.png", "c.png"], "conversations": PAIR},
            "2 times <image>, image has 3 paths",
        ),
        (
            {"image": ["a.png", "b.png"], "conversations": asked("what?")},
            "0 times <image>, image has 2 paths",
        ),
        (
            {"image": ["a.png", "../b.png"], "conversations": PAIR},
            r"image '\.\./b\.png' leads to .*out of the image folder",
        ),
        ({"image": ["a.png", 7], "conversations": PAIR}, "expected one path"),
        ({"image": []}, "expected one path"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, changes, message):
    with pytest.raises(records.DataError, match=rf"train\.jsonl:2: .*{message}"):
        records.read(write(tmp_path, line(), line(**changes)))


def test_all_pictures_are_counted_and_named(tmp_path, processor):
    (record,) = records.read(
        write(tmp_path, line(image=["a.png", "b.png"], conversations=PAIR))
    )
    Image.new("RGB", (112, 112)).save(tmp_path / "a.png")
    with pytest.raises(
        records.DataError, match=r"train\.jsonl:1: .*b\.png: cannot be read as an image"
    ):
        data.load_batch([record], processor)
    Image.new("RGB", (112, 56)).save(tmp_path / "b.png")
    assert data.load_batch([record], processor, 24).grid_thw.tolist() == [
        [1, 8, 8],
        [1, 4, 8],
    ]
    message = (
        r"train\.jsonl:1: .*a\.png \(112 x 112\) and .*b\.png \(112 x 56\) together take 24 tok"
        r"ens, "
        r"more than --max-image-tokens 23: .*--max-pixels 8624,"
    )
    with pytest.raises(records.DataError, match=message):
        data.load_batch([record], processor, 23)
    smaller = vlm.Processor.from_pretrained(
        evaluate.tiny.BASE, max_pixels=8624
    )  # what the message says helps
    assert len(data.load_batch([record], smaller, 23).grid_thw) == 2


# ---------------------------------------------------------------- in the model


def test_where_pictures_stand(processor):
    def said(text, counts):
        ids = processor.prompt_ids(text, counts)
        return processor.tokenizer.decode(ids).replace("<|image_pad|>", "#")

    one, two = "<|vision_start|>#<|vision_end|>", "<|vision_start|>##<|vision_end|>"
    assert f"user\n{one}{two}which?<|im_end|>" in said("which?", [1, 2])
    assert f"user\nis {one} or {two}?<|im_end|>" in said("is <image> or <image>?", [1, 2])
    assert f"user\n{one}what is <image>?<|im_end|>" in said(
        "what is <image>?", [1]
    )  # one picture is always in front


def test_a_part_of_a_batch_keeps_its_own_pictures(processor):
    whole = data.collate(TEXTS, pictures(), processor)
    assert whole.images == [2, 3, 1] and [
        row.count(processor.image_token_id) for row in whole.ids
    ] == [24, 18, 9]
    for i, (text, own) in enumerate(zip(TEXTS, pictures())):
        alone, part = data.collate([text], [own], processor), whole[[i]]
        assert part.ids == alone.ids and part.images == alone.images
        assert torch.equal(part.pixel_values, alone.pixel_values) and torch.equal(
            part.grid_thw, alone.grid_thw
        )
    turned = whole[[2, 1]]
    assert (
        turned.images == [1, 3]
        and turned.ids == [whole.ids[2], whole.ids[1]]
        and len(turned.pixel_values) == (9 + 18) * 4
    )
    assert torch.equal(
        turned.grid_thw, torch.cat([whole[[2]].grid_thw, whole[[1]].grid_thw])
    )


@torch.no_grad()
def test_positions_and_log_probabilities_are_those_of_transformers(processor, monkeypatch):
    """float64; two, three and one pictures of unequal sizes, in front and between, or not."""
    monkeypatch.setattr(Qwen2_5_VLRMSNorm, "forward", exact_norm)
    model = random_model(processor.tokenizer, hidden=192).double()
    plain, responses, rows, seen = (
        ordinary(model),
        random_responses(processor, [[4, 7], [5, 2], [3, 6]]),
        [],
        [],
    )
    prompts = data.encode(model, data.collate(TEXTS, pictures(), processor))
    forward = type(model.model.language_model).forward
    monkeypatch.setattr(
        type(model.model.language_model),
        "forward",
        lambda self, **options: (
            seen.append(options["position_ids"]),
            forward(self, **options),
        )[1],
    )
    for prompt, text, own, group in zip(prompts, TEXTS, pictures(), responses):
        pixel_values, grid = processor.pixels(own)
        ids = processor.prompt_ids(text, processor.visual_tokens(grid))
        for response in group:
            row = torch.tensor([ids + response])
            logits = plain(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                pixel_values=pixel_values,
                image_grid_thw=grid,
                mm_token_type_ids=(row == processor.image_token_id).int(),
            ).logits[0, len(ids) - 1 : -1]
            rows.append(
                logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
            )
            positions = seen.pop()[-3:, 0]  # transformers' own, (3, P + L)
            assert (
                torch.equal(positions[:, : len(ids)], prompt.positions)
                and positions[0, len(ids)] == prompt.next_position
            )
    for pack_from in (0.0, float("inf")):
        monkeypatch.setattr(vlm, "PACK_FROM", pack_from)
        logps, mask, _ = vlm.group_logps(model, prompts, responses)
        for ours, theirs in zip(logps, rows, strict=True):
            torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def pairs(world_folder, tmp_path_factory):
    """Stage III of Robust-U1 in the drawn world: [damaged, recovered, question] -> chain.

    The recovered picture stands for a restorer's, at half the height; every fourth record shows the
    damaged one alone."""
    folder = tmp_path_factory.mktemp("pairs")
    for name in ("images", "clean"):
        shutil.copytree(world_folder / name, folder / name)
    (folder / "recovered").mkdir()
    for name in ("train", "test"):
        lines = [
            json.loads(text)
            for text in (world_folder / f"{name}.jsonl").read_text().splitlines()
        ]
        for i, record in enumerate(lines):
            if i % 4 < 3:
                recovered = f"recovered/{name}-{i}.png"
                Image.open(folder / record.get("clean_image", record["image"])).resize(
                    (112, 56)
                ).save(folder / recovered)
                record["image"] = [record["image"], recovered]
                record["conversations"][0]["value"] = (
                    "<image>" + record["conversations"][0]["value"]
                )
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in lines)
        )
    return folder


@pytest.fixture(scope="module")
def tuned(checkpoint, pairs, tmp_path_factory):
    """The folder of a run of train_sft.py on pairs."""
    out = tmp_path_factory.mktemp("sft") / "run"
    train_sft.main(
        [
            "--model",
            checkpoint,
            "--data",
            f"{pairs}/train.jsonl",
            "--part",
            "all",
            "--out",
            str(out),
            *SMALL["sft"].split(),
        ]
    )
    return out


def rows(out):
    return [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]


@torch.no_grad()
def test_the_loss_is_that_of_plain_transformers_with_masked_labels(
    checkpoint, pairs, tuned, processor
):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint)
    found, total, tokens, several = records.read(pairs / "train.jsonl"), 0.0, 0, 0
    for i in data.batch_indices(len(found), 6, 0, seed=0):
        images = [Image.open(path) for path in records.image_paths(found[i]["image"])]
        pixel_values, grid = processor.pixels(images)
        prompt = processor.prompt_ids(
            build_prompt(found[i]["question"]), processor.visual_tokens(grid)
        )
        response = processor.response_ids(found[i]["response"])
        row = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        loss = model(
            input_ids=row,
            labels=labels,
            attention_mask=torch.ones_like(row),
            pixel_values=pixel_values,
            image_grid_thw=grid,
            mm_token_type_ids=(row == processor.image_token_id).int(),
        ).loss.item()
        total, tokens, several = (
            total + loss * len(response),
            tokens + len(response),
            several + (len(images) == 2),
        )
    assert several >= 3 and rows(tuned)[0]["tokens"] == tokens
    assert (
        rows(tuned)[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)
        and len(rows(tuned)) == 2
    )


def test_the_second_picture_matters(checkpoint, pairs, tuned, tmp_path):
    """Another recovered picture gives another loss: it is not the first one seen twice."""
    shutil.copytree(pairs, tmp_path / "other")
    for path in (tmp_path / "other" / "recovered").iterdir():
        Image.new("RGB", (112, 56)).save(path)
    train_sft.main(
        [
            "--model",
            checkpoint,
            "--data",
            f"{tmp_path}/other/train.jsonl",
            "--part",
            "all",
            "--out",
            str(tmp_path / "run"),
            *SMALL["sft"].split(),
            "--steps",
            "1",
        ]
    )
    assert abs(rows(tmp_path / "run")[0]["loss"] - rows(tuned)[0]["loss"]) > 1e-4


@both
def test_micro_batches_cut_between_prompts(checkpoint, pairs, tmp_path, script):
    losses = []
    for size in ("1", "6"):
        SCRIPTS[script].main(
            [
                "--model",
                checkpoint,
                "--data",
                f"{pairs}/train.jsonl",
                "--part",
                "all",
                "--out",
                str(tmp_path / size),
                *SMALL[script].split(),
                "--steps",
                "1",
                "--micro-batch",
                size,
            ]
        )
        losses.append(
            {name: rows(tmp_path / size)[0][name] for name in ("loss", "grad_norm")}
        )
    assert (
        losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-5)
        and losses[0]["grad_norm"] > 0
    )
    if script == "grpo":
        dumped = [
            json.loads(text)
            for text in (tmp_path / "6" / "rollouts.jsonl").read_text().splitlines()
        ]
        assert any(
            isinstance(row["image"], list) and len(row["image"]) == 2 for row in dumped
        )


@both
def test_a_record_whose_second_picture_is_bad_is_left_out(
    checkpoint, pairs, tmp_path, script, capsys
):
    shutil.copytree(pairs, tmp_path / "bad")
    (tmp_path / "bad" / "recovered" / "train-1.png").write_bytes(b"no picture")
    arguments = [
        "--model",
        checkpoint,
        "--data",
        f"{tmp_path}/bad/train.jsonl",
        "--part",
        "all",
        "--out",
        str(tmp_path / "run"),
        *SMALL[script].split(),
        "--steps",
        "1",
        "--skip-bad",
        "--max-image-tokens",
        "24",
    ]
    SCRIPTS[script].main(arguments)
    assert "1 bad records are left out" in capsys.readouterr().out
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())["records"]
    assert (
        list(skipped) == ["1"]
        and "train.jsonl:2: " in skipped["1"]
        and "recovered/train-1.png" in skipped["1"]
    )


def test_evaluation(pairs, tuned, tmp_path, monkeypatch):
    """Every answer is the one given alone, a picture that follows in two jobs is encoded once, and
    Table 2 has the single pictures only."""
    folder = tmp_path / "pairs"
    shutil.copytree(pairs, folder)
    lines = (folder / "test.jsonl").read_text().splitlines()
    pair = json.loads(lines[0])
    alone = copy.deepcopy(pair) | {"id": "alone", "image": pair["image"][0]}
    alone["conversations"][0]["value"] = alone["conversations"][0]["value"].removeprefix(
        "<image>"
    )
    swapped = copy.deepcopy(pair) | {"id": "swapped", "image": pair["image"][::-1]}
    (folder / "test.jsonl").write_text(
        "\n".join([*lines, json.dumps(alone), json.dumps(swapped)]) + "\n"
    )
    encoded, encode = [], vlm.encode_images
    monkeypatch.setattr(
        vlm,
        "encode_images",
        lambda model, pixels, grid: (
            encoded.append(len(grid)),
            encode(model, pixels, grid),
        )[1],
    )
    evaluate.main(
        [
            "--model",
            str(tuned / "model"),
            "--data",
            f"{folder}/test.jsonl",
            "--out",
            str(tmp_path / "out"),
            "--max-new-tokens",
            "20",
            "--batch",
            "5",
            "--levels",
            "1",
            "--temperature",
            "1",
        ]
    )
    monkeypatch.undo()
    answers = {
        row["key"]: row
        for row in map(
            json.loads,
            (tmp_path / "out" / "model" / "predictions.jsonl").read_text().splitlines(),
        )
    }
    asked_for = records.read(folder / "test.jsonl")
    several = [r for r in asked_for if isinstance(r["image"], list)]
    singles = [r for r in asked_for if isinstance(r["image"], str)]
    assert len(several) == 13 and {key.split()[0] for key in answers if " " in key} == {
        str(r["number"]) for r in singles if r["choices"]
    }
    damaged = sum(r["clean_image"] != r["image"] for r in singles)
    assert (
        sum(encoded)
        == 2 * len(several) + damaged + 2 * sum(bool(r["choices"]) for r in singles) - 1
    ), "`alone` comes right after `pair`"
    model, processor = vlm.load(str(tuned / "model"))
    checked = [several[0], several[-2], several[-1], singles[-1]]
    assert len({answers[str(r["number"])]["response"] for r in checked}) == 4, (
        "a slip to another's pictures would show"
    )
    for r in checked:
        batch = data.load_batch([r], processor)
        [[answer]] = rollout.sample_group(
            model,
            data.encode(model, batch),
            1,
            [crc32(f"0 {r['number']}".encode())],
            end_id=processor.end_id,
            max_new_tokens=20,
            banned=processor.banned_ids,
        )
        assert answers[str(r["number"])]["response"] == processor.decode(answer.ids), r[
            "id"
        ]
    assert "Table 1" in (tmp_path / "out" / "report.txt").read_text()
