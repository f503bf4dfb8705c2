"""The drawn world and its model: one seed, one right answer, chains of the right form and
length; and no trace of it elsewhere."""

import ast
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from degrade import DEGRADATIONS, Degradation, degrade
from rr1 import data, records, tiny, vlm
from rr1.answers import choice_index
from rr1.chain import TAGS, build_prompt, is_well_formed, parse, render
from rr1.tiny import lessons, questions, scenes, world
from rr1.tiny import model as tiny_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built():
    return tiny_model.build_processor()


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return [scenes.sample_scene(rng) for _ in range(300)]


@pytest.fixture(scope="module")
def samples():
    return [world.sample(i, seed=3) for i in range(160)]


@pytest.fixture(scope="module")
def chains():
    """(total intensity, text, length to aim for) of many good chains, mixed as the held-out
    records are."""
    rows = []
    for i in range(1200):
        record = world.undamaged(i, seed=3)[2]
        total = sum(d["intensity"] for d in record["degradations"])
        rows.append((total, record["conversations"][1]["value"], record["length"]))
    return rows


# ---------------------------------------------------------------- one seed fixes everything

HASH = """
import hashlib, json, random
import numpy as np
from rr1.tiny import lessons, questions, scenes, world
random.seed(5), np.random.seed(5)
for i in (0, 1, 2, 17):
    clean, image, record = world.sample(i, seed=3)
    drawn = clean.tobytes() + image.tobytes() + json.dumps(record).encode()
    print(hashlib.sha256(drawn).hexdigest())
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


def test_pictures_forms_and_levels(samples):
    for clean, image, record in samples:
        assert (
            clean.shape == image.shape == (112, 112, 3)
            and clean.dtype == image.dtype == np.uint8
        )
        assert (clean == image).all() == (record["level"] == "none")
        low, high = world.LEVELS[record["level"]]
        total = sum(d["intensity"] for d in record["degradations"])
        assert low < total <= high or total == low == high
    forms = [s.record["form"] for s in samples]
    for form, share in {"choice": 0.4, "open": 0.5, "caption": 0.1}.items():
        assert abs(forms.count(form) / len(forms) - share) < 0.15
    levels = [world.undamaged(i, 1)[2]["level"] for i in range(64)]
    assert levels.count("strong") == 32 and world.TEST * 4 // 8 >= 800
    rng = np.random.default_rng(0)
    kinds = {kind for _ in range(400) for kind, _ in world.sample_damage(rng, "strong")}
    assert kinds == set(DEGRADATIONS)


# ---------------------------------------------------------------- what the damage does to a colour


@pytest.mark.parametrize("s", [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("kind", ["darkness", "saturation"])
def test_the_ladders_are_what_the_pixels_show(kind, s):
    """A plain field of a colour, damaged, is nearest to what INFLUENCE says that it looks like.
    Beyond .65 it has sunk further, but not below what the next colour on its ladder has become:
    the damage can still be undone."""
    said = questions.looks(questions.influence([Degradation(kind, s)]))
    assert bool(said) == (s > 0.2 if kind == "saturation" else s > 0.1)
    if s > 0.65:
        ladders = [scenes.BRIGHTNESS] if kind == "darkness" else said.items()
        for ladder in ladders:
            fields = [np.full((64, 64, 3), scenes.COLORS[c], np.uint8) for c in ladder]
            shown = [degrade(field, [(kind, s)], 0).astype(float) for field in fields]
            if kind == "darkness":
                strength = [field.mean() for field in shown]
            else:
                strength = [np.ptp(field, axis=-1).mean() for field in shown]
            assert (np.diff(strength) < -5).all()
        return
    dark = kind == "darkness"
    for color in scenes.BRIGHTNESS[:2] if dark else {**scenes.COLORS, **said}:
        if color not in said and color in ("blue", "sage", "rust", "green", "yellow"):
            continue  # with little colour left these are near to several
        field = np.full((64, 64, 3), scenes.COLORS[color], np.uint8)
        shown = degrade(field, [(kind, s)], 0).reshape(-1, 3).mean(0)

        def distance(other, shown=shown):  # in darkness, of the brightness alone
            apart = np.subtract(shown, scenes.COLORS[other])
            return abs(apart.mean()) if dark else np.linalg.norm(apart)

        nearest = min(scenes.BRIGHTNESS if dark else scenes.COLORS, key=distance)
        assert nearest == said.get(color, color)


def test_a_note_says_what_the_true_colours_look_like(drawn):
    """The lessons' notes can be undone: no colour of the scene is looked like by another."""
    rng = np.random.default_rng(0)
    changed = 0
    for scene in drawn:
        seen, note = lessons.looks_otherwise(scene, rng)
        looks = questions.looks(note)
        true = {thing.color for thing in scene.things}
        assert not true & set(looks.values())
        assert len(set(looks.values())) == len(looks)
        for thing, shown in zip(scene.things, seen.things, strict=True):
            assert shown == thing._replace(color=looks.get(thing.color, thing.color))
        changed += seen != scene
    assert changed > len(drawn) / 2


# ---------------------------------------------------------------- scenes and questions


def test_no_two_things_share_a_shape_or_a_place(drawn):
    for scene in drawn:
        shapes, _, places = zip(*scene.things)
        assert len(set(shapes)) == len(set(places)) == len(scene.things)
        assert [*places] == [
            place for place in scenes.PLACES if place in places
        ]  # reading order
    assert {len(scene.things) for scene in drawn} == {1, 2, 3, 4}


def find(scene, words):
    """The things that words point to: a shape, a colour, a place, or `SIDE (of) the X`, nested."""
    if match := re.fullmatch(
        r"(right of|left of|below|above) (?:the )?(?:one )?(.+)", words
    ):
        [start] = find(scene, match[2])
        down, right = {
            "right of": (0, 1),
            "left of": (0, -1),
            "below": (1, 0),
            "above": (-1, 0),
        }[match[1]]
        row, column = divmod(scenes.PLACES.index(start.place), 2)
        return [
            t
            for t in scene.things
            if divmod(scenes.PLACES.index(t.place), 2) == (row + down, column + right)
        ]
    return [
        t for t in scene.things if words.removeprefix("the ") in (t.shape, t.color, t.place)
    ]


def answers(scene, text):
    """All right answers to a question, read off the scene by its words alone."""
    if match := re.fullmatch(r"what color is (.+)\?", text):
        return [t.color for t in find(scene, match[1])]
    if match := re.fullmatch(r"what shape is (.+)\?", text):
        return [t.shape for t in find(scene, match[1])]
    if match := re.fullmatch(r"where is (.+)\?", text):
        return [t.place for t in find(scene, match[1])]
    counts = ("one", "two", "three", "four")
    if match := re.fullmatch(r"how many shapes are (\w+)\?", text):
        there = scene.things if match[1] == "there" else find(scene, match[1])
        return [counts[len(there) - 1]]
    if match := re.fullmatch(r"which is brighter, the (\w+) or the (\w+)\?", text):
        pair = [t for t in scene.things if t.shape in match.groups()]
        light = [sum(scenes.COLORS[t.color]) for t in pair]
        assert light[0] != light[1]
        return [pair[int(np.argmax(light))].shape]
    return {
        "what is the ground?": [scene.ground],
        "describe the picture.": [questions.caption(scene)],
    }[text]


def test_every_question_has_one_right_answer(drawn):
    kinds = set()
    for scene in drawn:
        asked = questions.questions(scene)
        assert len({question.text for question in asked}) == len(asked)
        for question in asked:
            assert answers(scene, question.text) == [question.answer], question
            assert question.answer in question.statement and question.steps
            kinds.add((question.kind, question.n_steps))
    assert {n for _, n in kinds} == {1, 2, 3} and len(kinds) == 13


def test_choices_hold_the_right_answer_once(drawn):
    rng, places = np.random.default_rng(0), []
    for scene in drawn:
        for question in questions.questions(scene)[:-1]:
            options = questions.choices(question, rng)
            assert len(set(options)) == 4 and options.count(question.answer) == 1
            assert set(options) <= set(question.options)
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
            assert " ".join(f"{i}. {c}" for i, c in enumerate(record["choices"])) in human
            assert right in chain.conclusion
        elif record["form"] == "caption":
            assert record["answer"] is None and chain.conclusion == record["caption"]
        else:
            assert record["choices"] is None and record["answer"] in chain.conclusion


def test_a_quarter_of_the_training_records_holds_chains_and_the_split_finds_it():
    chosen = [world.undamaged(i, 0)[2] for i in range(400)]
    with_chain = {record["id"] for record in chosen if len(record["conversations"]) == 2}
    assert with_chain == {r["id"] for r in chosen if data.part_of(r["id"]) == "sft"}
    assert 70 < len(with_chain) < 130
    assert all(
        record["length"] > 20 and record["degradations"] is not None for record in chosen
    )


# ---------------------------------------------------------------- chains: form and length (Eq. 7)


def test_true_chains_are_well_formed_and_their_length_is_known_without_a_tokenizer(
    chains, processor
):
    for _, text, _ in chains:
        assert is_well_formed(text) and render(parse(text)) == text
    for _, text, _ in chains[:200]:
        assert questions.tokens(text) == len(processor.response_ids(text)) - 1


def test_good_chains_have_the_length_that_eq_7_asks_for(chains):
    totals, texts, aims = zip(*chains)
    lengths = [questions.tokens(text) for text in texts]
    assert np.corrcoef(totals, lengths)[0, 1] > 0.9
    assert np.mean(np.abs(np.subtract(lengths, aims))) < 4
    assert max(lengths) <= 90


def test_the_teacher_of_fine_tuning_is_of_mixed_quality():
    rows = [world.undamaged(i, 0)[2] for i in range(2000)]
    rows = [record for record in rows if len(record["conversations"]) == 2]
    off = [
        abs(questions.tokens(r["conversations"][1]["value"]) - r["length"]) for r in rows
    ]
    assert 0.3 < np.mean([d > 4 for d in off]) < 0.7


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
    assert [t for t in split if any(c.isdigit() for c in t)] == [
        "(0.",
        "4",
        "7",
        "(1.",
        "0",
        "0",
    ]
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
    image = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    start, end = "<|im_start|>", "<|im_end|>"
    assert text == f"{start}user\n{image}why?{end}\n{start}assistant\n"
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
    (Which word has which id follows from the order of merges, and that from the drawn world's
    sentences: it may move when those do.)"""
    shipped, processor = vlm.load(folder)
    model = tiny_model.build_model(processor.tokenizer)
    assert {n: p.shape for n, p in shipped.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert (
        shipped.config.text_config.rope_parameters
        == model.config.text_config.rope_parameters
    )
    for text in tiny_model.corpus(40, seed=1):
        assert processor.tokenizer.tokenize(text) == built.tokenizer.tokenize(text), text
    assert (
        processor.tokenizer.chat_template == built.tokenizer.chat_template
        and processor.tokenizer.eos_token == built.tokenizer.eos_token
    )
    assert processor.image_processor.size == built.image_processor.size
    assert Path(folder, "model.safetensors").stat().st_size <= 8e6


# ---------------------------------------------------------------- the world on disk


def test_written_records_load(tmp_path):
    folder = world.write(tmp_path / "world", train=48, test=16)
    train, test = (records.read(folder / f"{split}.jsonl") for split in ("train", "test"))
    assert (
        len(train) == 48
        and len(test) == 16
        and not {r["id"] for r in train} & {r["id"] for r in test}
    )
    for record in [*train, *test]:
        assert data.open_image(record["image"]).size == (112, 112)
        assert (record["choices"] is not None) == (record["form"] == "choice")
        if record["response"] is not None:
            assert record["chain"].degradations == record["degradations"]
    for record in test:
        clean, damaged = (
            np.asarray(data.open_image(record[key])) for key in ("clean_image", "image")
        )
        assert (clean == damaged).all() == (
            not any(d.intensity for d in record["degradations"])
        )
    drawn = world.sample(5, seed=0)
    assert (np.asarray(data.open_image(train[5]["image"])) == drawn.image).all() and train[
        5
    ]["id"] == drawn.record["id"]


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
    path.write_text(path.read_text().replace("what shape", "which shape"))
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


# ---------------------------------------------------------------- pretraining


def test_pretraining_makes_a_model_and_skips_what_is_done(tmp_path):
    command = [sys.executable, "-m", "rr1.tiny.pretrain", "--out", tmp_path, "--batch", 2]
    command += ["--vision-steps", 1, "--steps", 1, "--notes", 1]
    times = []
    for _ in range(2):
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
        times.append({p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")})
    assert times[0] == times[1]
    assert set(times[0]) == {f"{n}.safetensors" for n in ("1-vision", "2-whole", "3-notes")}
    model, _ = vlm.load(str(tmp_path / "model"))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_notes_are_for_the_share_of_pictures_that_is_asked_for(built):
    def begun(notes):
        batches = lessons.Batches(built, 4, 0, [0], talk=True, notes=notes)
        talks = batches.batch(np.random.default_rng(0))["conversations"]
        return [built.decode(talk[0][0]) for talk in talks]

    said = ("light is low", "colors fade")
    assert not any(text.startswith(said) for text in begun(0.0))
    assert all(text.startswith(said) for text in begun(1.0))
