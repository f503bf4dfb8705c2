"""The drawn world and its model: one seed, one right answer, chains of the right form and length;
and no trace of it elsewhere."""

import ast
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from degrade import DEGRADATIONS, sample_degradations
from rr1 import records, tiny, vlm
from rr1.answers import choice_index
from rr1.chain import TAGS, build_prompt, is_well_formed, parse, render
from rr1.tiny import model as tiny_model
from rr1.tiny import scenes as drawing
from rr1.tiny import world

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built():
    return tiny_model.build_processor()


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [world.sample_scene(rng) for _ in range(300)]


@pytest.fixture(scope="module")
def samples():
    return [world.sample(i, seed=3) for i in range(150)]


@pytest.fixture(scope="module")
def chains(processor):
    """(total intensity, text, tokens without the end of turn) of many true chains, mixed as
    `world.sample` mixes them."""
    rng, rows = np.random.default_rng(1), []
    for _ in range(1500):
        scene = world.sample_scene(rng)
        asked = world.questions(scene)
        question = asked[-1] if rng.random() < 0.2 else asked[rng.integers(len(asked) - 1)]
        damage = [] if rng.random() < 1 / 8 else sample_degradations(rng, low=1, high=2)
        answer = None if question.kind == "caption" else question.answer
        text = render(world.true_chain(scene, question, damage, answer))
        rows.append(
            (sum(d.intensity for d in damage), text, len(processor.response_ids(text)) - 1)
        )
    return rows


# ---------------------------------------------------------------- one seed fixes everything

HASH = """
import hashlib, json, random
import numpy as np
from rr1.tiny import world
random.seed(5), np.random.seed(5)
for i in (0, 1, 2, 17):
    clean, image, record = world.sample(i, seed=3)
    bits = clean.tobytes() + image.tobytes() + json.dumps(record).encode()
    print(hashlib.sha256(bits).hexdigest())
"""


def test_the_same_seed_draws_the_same_in_another_process(samples):
    other = subprocess.run(
        [sys.executable, "-c", HASH], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    ours = [
        hashlib.sha256(
            clean.tobytes() + image.tobytes() + json.dumps(record).encode()
        ).hexdigest()
        for clean, image, record in (samples[i] for i in (0, 1, 2, 17))
    ]
    assert ours == other and len(set(ours)) == 4


def test_another_seed_is_another_world():
    assert all(
        (world.sample(i, 0).clean != world.sample(i, 1).clean).any() for i in range(3)
    )


def test_pictures_and_forms(samples):
    for clean, image, record in samples:
        assert (
            clean.shape == image.shape == (112, 112, 3)
            and clean.dtype == image.dtype == np.uint8
        )
        assert (clean == image).all() == (
            not any(d["intensity"] for d in record["degradations"])
        )
    share = {
        form: np.mean([s.record["form"] == form for s in samples])
        for form in ("choice", "open", "caption")
    }
    assert (
        abs(share["choice"] - 0.5) < 0.15
        and abs(share["open"] - 0.3) < 0.15
        and abs(share["caption"] - 0.2) < 0.15
    )
    assert 0.03 < np.mean([not s.record["degradations"] for s in samples]) < 0.25
    assert len({d["type"] for s in samples for d in s.record["degradations"]}) == len(
        DEGRADATIONS
    )


# ---------------------------------------------------------------- scenes and questions


def test_no_two_things_share_a_shape_a_color_or_a_place(scenes):
    for scene in scenes:
        for kind in zip(*scene.things):
            assert len(set(kind)) == len(kind) == len(scene.things)
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}


def test_captions_follow_the_reading_order(scenes):
    for scene in scenes:
        text = world.caption(scene)
        places = [place for place in re.findall("|".join(drawing.PLACES), text)]
        assert places == [
            place for place in drawing.PLACES if place in places
        ]  # top left, top right, bottom left, ..
        for shape, color, place in scene.things:
            assert f"a {color} {shape} {place}" in text
        assert text.endswith(f" on {scene.ground}") and text.count(" a ") + text.startswith(
            "a "
        ) == len(scene.things)


def answers(scene, text):
    """All right answers to a question, read off the scene by its words alone."""
    if match := re.fullmatch(r"what color is the (\w+)\?", text):
        return [t.color for t in scene.things if t.shape == match[1]]
    if match := re.fullmatch(r"what shape is (\w+)\?", text):
        return [t.shape for t in scene.things if t.color == match[1]]
    if match := re.fullmatch(r"where is the (\w+)\?", text):
        return [t.place for t in scene.things if t.shape == match[1]]
    return {
        "how many shapes are there?": [["one", "two", "three"][len(scene.things) - 1]],
        "what is the ground?": [scene.ground],
        "describe the picture.": [world.caption(scene)],
    }[text]


def test_every_question_has_one_right_answer(scenes):
    for scene in scenes:
        asked = world.questions(scene)
        assert (
            len({question.text for question in asked})
            == len(asked)
            == 3 * len(scene.things) + 3
        )
        for question in asked:
            assert answers(scene, question.text) == [question.answer]
            assert question.answer in question.statement


def test_choices_hold_the_right_answer_once(scenes):
    rng, places = np.random.default_rng(0), []
    for scene in scenes:
        for question in world.questions(scene)[:-1]:
            options = world.choices(question, rng)
            assert (
                len(set(options)) == 4
                and options.count(question.answer) == 1
                and set(options) <= set(question.options)
            )
            places.append(options.index(question.answer))
    assert np.bincount(places).min() > len(places) / 4 * 0.85, (
        "the right choice should stand anywhere"
    )


def test_a_record_says_what_was_asked_and_done(samples):
    for _, _, record in samples:
        human, gpt = (turn["value"] for turn in record["conversations"])
        chain = parse(gpt)
        assert (
            is_well_formed(gpt)
            and [d._asdict() for d in chain.degradations] == record["degradations"]
        )
        assert chain.answer == record["answer"] and human.startswith("<image>")
        if record["form"] == "choice":
            right = record["choices"][choice_index(record["answer"], record["choices"])]
            assert (
                " ".join(f"{i}. {c}" for i, c in enumerate(record["choices"])) in human
                and right in chain.conclusion
            )
        elif record["form"] == "caption":
            assert record["answer"] is None and chain.conclusion == record["caption"]
        else:
            assert record["choices"] is None and record["answer"] in chain.conclusion


# ---------------------------------------------------------------- chains: form and length (Eq. 7)


def test_true_chains_are_well_formed(chains):
    for _, text, _ in chains:
        assert is_well_formed(text) and render(parse(text)) == text


def test_chains_grow_with_the_total_intensity(chains):
    totals, lengths = (
        np.array([total for total, _, _ in chains]),
        np.array([n for _, _, n in chains]),
    )
    means = [
        lengths[(totals >= low) & (totals < low + 0.5)].mean() for low in (0, 0.5, 1.0)
    ]
    assert means[0] + 5 < means[1] and means[1] + 5 < means[2], means
    assert np.corrcoef(totals, lengths)[0, 1] > 0.6


def test_chains_are_short_enough_for_a_laptop(chains):
    low, high = np.percentile([n for _, _, n in chains], [5, 95])
    assert 25 <= low and high <= 95, (low, high)
    assert np.mean([40 <= n <= 90 for _, _, n in chains]) > 0.6


# ---------------------------------------------------------------- tokenizer and model


def test_the_tokenizer_gives_chains_and_prompts_back(processor, chains, samples):
    prompts = [
        build_prompt(s.record["conversations"][0]["value"].removeprefix("<image>"))
        for s in samples
    ]
    for text in (
        [text for _, text, _ in chains[:200]]
        + prompts
        + ["Übrigens 你好 ~{}[]^|\t\\ 3.14e-7"]
    ):
        assert processor.decode(processor.response_ids(text)) == text


def test_digits_stand_apart_and_each_tag_of_a_chain_is_one_token(processor, chains):
    split = processor.tokenizer.tokenize("<TYPE>noise(0.47), darkness(1.00)<TYPE_END>")
    assert [token for token in split if any(c.isdigit() for c in token)] == list("047100")
    assert not [
        token
        for token in processor.tokenizer.get_vocab()
        if len(re.findall(r"\d", token)) > 1
    ]
    for _, text, _ in chains[:100]:
        tokens = processor.tokenizer.tokenize(text)
        assert [token.lstrip("Ċ") for token in tokens if "<" in token or ">" in token] == [
            tag for tag in TAGS if tag in text
        ]
    assert len(processor.tokenizer) <= 1024


def test_the_processor_is_qwens(processor):
    text = processor.tokenizer.decode(processor.prompt_ids("why?", [2]))
    assert (
        text
        == "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>why?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    _, grid = processor.pixels([np.zeros((112, 112, 3), np.uint8)])
    assert grid.tolist() == [[1, 8, 8]] and processor.visual_tokens(grid) == [16]


def test_the_model_is_a_qwen_of_about_3_million_parameters(processor):
    model = tiny_model.build_model(processor.tokenizer)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 2.5e6 < sum(p.numel() for p in model.parameters()) < 4e6
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("folder", [tiny.BASE, tiny.SFT], ids=["base", "sft"])
def test_shipped_checkpoints_are_what_the_code_builds(built, folder):
    """The layout, the tokenizer's words and where it cuts, the size that a repository bears.
    (Which word has which id follows from
    the order of merges, and that from the drawn world's sentences: it may move when those do.)"""
    shipped, processor = vlm.load(folder)
    model = tiny_model.build_model(built.tokenizer)
    assert {n: p.shape for n, p in shipped.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert (
        shipped.config.text_config.rope_parameters
        == model.config.text_config.rope_parameters
    )
    assert set(processor.tokenizer.get_vocab()) == set(built.tokenizer.get_vocab())
    for text in tiny_model.corpus(40, seed=1):
        assert processor.tokenizer.tokenize(text) == built.tokenizer.tokenize(text), text
    assert (
        processor.tokenizer.chat_template == built.tokenizer.chat_template
        and processor.end_id == built.end_id
    )
    assert processor.image_processor.size == built.image_processor.size
    assert Path(folder, "model.safetensors").stat().st_size <= 8e6


# ---------------------------------------------------------------- the world on disk


def test_written_records_load(world_folder):
    train, test = (
        records.read(world_folder / f"{split}.jsonl") for split in ("train", "test")
    )
    assert (
        len(train) == 48
        and len(test) == 16
        and not {r["id"] for r in train} & {r["id"] for r in test}
    )
    for record in [*train, *test]:
        assert records.open_image(record["image"]).size == (112, 112)
        assert record["chain"].degradations == record["degradations"] and (
            record["choices"] is not None
        ) == (record["form"] == "choice")
    for record in test:
        clean, damaged = (
            np.asarray(records.open_image(record[key])) for key in ("clean_image", "image")
        )
        assert (clean == damaged).all() == (
            not any(d.intensity for d in record["degradations"])
        )
    drawn = world.sample(5, seed=0)
    assert (
        np.asarray(records.open_image(train[5]["image"])) == drawn.image
    ).all() and train[5]["id"] == drawn.record["id"]


def test_a_world_cut_off_while_it_was_written_is_finished_and_one_that_is_whole_is_left_alone(
    tmp_path,
):
    world.write(tmp_path, train=3, test=2)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in files if path.suffix != ".png"} == {
        "train.jsonl",
        "test.jsonl",
    }
    written = (tmp_path / "train.jsonl").stat().st_mtime_ns
    (tmp_path / "test.jsonl").unlink()
    next((tmp_path / "clean").iterdir()).unlink()
    world.write(tmp_path, train=3, test=2)
    assert {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    } == files
    assert (tmp_path / "train.jsonl").stat().st_mtime_ns == written
    for other in ({"train": 4, "test": 2}, {"train": 3, "test": 2, "seed": 1}):
        with pytest.raises(
            SystemExit, match="train.jsonl holds another world .3 records.*--out"
        ):
            world.write(tmp_path, **other)


# ---------------------------------------------------------------- nothing outside knows of it


def test_a_world_of_another_version_is_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "WORLD", world.write(tmp_path / "world", train=4, test=4))
    assert tiny.dataset("test") == str(
        tmp_path / "world" / "test.jsonl"
    )  # with `clean_image`, which is no difference
    path = tmp_path / "world" / "train.jsonl"
    path.write_text(path.read_text().replace("the picture shows", "one sees"))
    with pytest.raises(
        SystemExit, match="drawn by another version of rr1: delete that folder"
    ):
        tiny.dataset("train")


def test_nothing_outside_asks_whether_this_is_the_tiny_model():
    """Outside rr1/tiny it is named only for default paths: no branch, no comparison, no other
    import."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "rr1").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tiny"
        }
        assert used <= {"BASE", "SFT", "GRPO", "RESTORER", "WORLD", "dataset", "pairs"}, (
            path.name,
            used,
        )
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
            if node.module.startswith("rr1.tiny")
        }
        assert not imported, (path.name, imported)
        for node in ast.walk(tree):
            question = (
                getattr(node, "test", None)
                if isinstance(node, (ast.If, ast.IfExp, ast.While))
                else node
                if isinstance(node, ast.Compare)
                else None
            )
            assert question is None or "tiny" not in ast.unparse(question), (
                path.name,
                ast.unparse(question),
            )
