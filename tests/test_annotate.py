"""Building a data set: what each step of Eq. (14)-(17) sees, what is rejected, and a teacher over
real HTTP that answers well, badly, late or never, while the process is killed."""

import base64
import json
import re
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from endpoint import flags, good_answer, serving, start, write_questions
from matplotlib.figure import Figure

from degrade import DEGRADATIONS, STAGES, Degradation, degrade
from rr1 import annotate, records, rewards
from rr1.annotate import __main__ as command
from rr1.annotate import card, teachers
from rr1.annotate.questions import Truth, read_questions
from rr1.annotate.teachers import Rejected, fill, template_teacher
from rr1.chain import Chain, is_well_formed, render
from rr1.client import ChatClient
from rr1.files import read_lines

PHOTOS = Path(__file__).resolve().parent.parent.parent / "shared" / "photos"
TRUTH = Truth("what is on the track?", ["a truck", "a wagon", "a jeep"], "1")
D_D = [Degradation("lens blur", 0.47), Degradation("noise", 0.9)]
X, X_D = np.zeros((6, 8, 3), np.uint8), np.full((6, 8, 3), 9, np.uint8)
CHAIN = Chain(D_D, "soft and grainy", "wheels on rails", "it is a wagon", "1")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("photos"))


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """The card's picture is slow to draw. `built` below is older than this fixture and has it."""
    monkeypatch.setattr(card.Card, "figure", lambda _: Figure((1, 1)))


def build(questions, out, *flags):
    command.main(["--data", str(questions), "--out", str(out), *map(str, flags)])
    return read_lines(out / "train.jsonl")


# ---------------------------------------------------------------- the equations


def seen(call):
    """What a teacher is given by an equation: (step, pictures, filled prompt)."""
    calls = []
    call(
        lambda step, images, **values: (
            calls.append((step, images, fill(step, values))) or "some text"
        )
    )
    return calls[0]


def test_influence_sees_both_pictures_the_damage_and_the_truth():
    step, images, prompt = seen(lambda G: annotate.influence(G, X, X_D, D_D, TRUTH))
    assert step == "influence" and images[0] is X and images[1] is X_D and len(images) == 2
    for part in (
        "lens blur(0.47), noise(0.90)",
        "what is on the track?\n0. a truck 1. a wagon 2. a jeep",
        "True answer: 1. a wagon",
    ):
        assert part in prompt


def test_reasoning_sees_the_damaged_picture_the_damage_the_influence_and_the_truth():
    step, images, prompt = seen(
        lambda G: annotate.reasoning(G, X_D, D_D, "rails look soft", TRUTH)
    )
    assert step == "reasoning" and len(images) == 1 and images[0] is X_D
    for part in (
        "lens blur(0.47), noise(0.90)",
        "rails look soft",
        "True answer: 1. a wagon",
    ):
        assert part in prompt


def test_conclusion_sees_the_reasoning_and_the_truth_alone():
    step, images, prompt = seen(
        lambda G: annotate.conclusion(G, "it stands on rails", TRUTH)
    )
    assert (
        step == "conclusion"
        and not images
        and "it stands on rails" in prompt
        and "True answer: 1. a wagon" in prompt
    )
    assert "lens blur" not in prompt


def test_scale_length_asks_for_the_words_of_the_total_intensity():
    prompts = []
    scaled = annotate.scale_length(
        lambda step, images, **f: prompts.append(fill(step, f)) or f["chain"],
        CHAIN,
        (10, 100),
    )
    assert scaled == CHAIN and annotate.target_words(1.37, (10, 100)) == 147
    assert (
        "about 147 words" in prompts[0]
        and "1.37" in prompts[0]
        and prompts[0].endswith(render(CHAIN))
    )


def test_each_step_reads_what_the_one_before_it_wrote():
    calls = []

    def G(step, images, **values):
        calls.append((step, values))
        return values["chain"] if step == "length" else f"the {step}"

    assert annotate.build_chain(G, X, X_D, D_D, TRUTH) == Chain(
        D_D, "the influence", "the reasoning", "the conclusion", "1"
    )
    assert [step for step, _ in calls] == list(teachers.STEPS)
    assert (
        calls[1][1]["influence"] == "the influence"
        and calls[2][1]["reasoning"] == "the reasoning"
    )


def test_comment_lines_of_a_template_are_not_sent():
    assert (teachers.PROMPTS / "influence.txt").read_text().startswith(
        "#"
    ) and "Psi" not in fill("influence", {"degradations": [], "truth": TRUTH})


@pytest.mark.parametrize(
    "answer, reason",
    [
        (render(CHAIN).replace("<REASONING_END>", ""), "a tag is lost"),
        (render(CHAIN)[:-20], "the answer '1' became None"),
        (render(CHAIN)[:120], "a tag is lost"),
        ("Here it is:\n" + render(CHAIN), "text outside"),
        (render(CHAIN).replace("noise", "fog"), "a type"),
        (render(Chain(D_D[:1], "a", "b", "c", "1")), "a type"),
        (
            render(CHAIN)
            .replace("0.90", "0.9")
            .replace("lens blur(0.47)", "lens blur(0.5)"),
            "an intensity",
        ),
        (render(Chain(D_D, "a", "b", "c", "a wagon")), "the answer '1' became 'a wagon'"),
        (render(Chain(D_D, "a", "b", "c")), "the answer '1' became None"),
        (render(Chain(D_D, "a", "", "c", "1")), "a section is empty"),
        ("", "empty"),
        ("I'm sorry, but I can't help with that.", "refused"),
    ],
)
def test_a_scaled_chain_that_lost_something_is_rejected(answer, reason):
    with pytest.raises(Rejected, match=reason) as caught:
        annotate.scale_length(lambda *_, **__: answer, CHAIN)
    assert caught.value.step == "length" and caught.value.answer == answer.strip()


def test_a_section_comes_without_its_own_tags_and_never_with_others():
    def said(text):
        return annotate.conclusion(lambda *_, **__: text, "rails", TRUTH)

    assert said("  a wagon\n") == said("<CONCLUSION>a wagon<CONCLUSION_END>") == "a wagon"
    for text, reason in (
        ("a <TYPE>wagon", "tag"),
        (" ", "empty"),
        ("I cannot assist with this picture.", "refused"),
    ):
        with pytest.raises(Rejected, match=reason):
            said(text)


# ---------------------------------------------------- the offline teacher, and what is written


@pytest.fixture(scope="module")
def built(questions, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "data"
    return SimpleNamespace(out=out, rows=build(questions, out))


def test_the_data_can_be_read_and_the_damage_repeated(built, questions):
    read = records.read(built.out / "train.jsonl")
    assert [r["id"] for r in read] == [
        f"q{n}" for n in range(12)
    ]  # in the questions' order, whichever was ready first
    for record in read:
        assert (
            is_well_formed(record["response"])
            and record["chain"].degradations == record["degradations"]
        )
        clean, damaged = (
            np.asarray(records.open_image(record[name]))
            for name in ("clean_image", "image")
        )
        assert np.array_equal(
            degrade(clean, record["degradations"], record["seed"]), damaged
        )
        assert rewards.accuracy(rewards.Response(record["response"], 1), record) == 1
        assert 1 <= len(record["degradations"]) <= 4
    assert (
        read[1]["choices"]
        and read[1]["answer"] in "0123"
        and read[0]["choices"] is None
        and not read[0]["answer"].isdigit()
    )


def test_chains_are_as_long_as_the_damage_calls_for():
    """Eq. (7), (17), offline: more words for more damage, within a sentence of the target."""
    rng = np.random.default_rng(0)
    lengths = []
    for s in (0.1, 0.4, 0.7, 1.0):
        D_d = [
            Degradation(str(name), s)
            for name in rng.choice(list(DEGRADATIONS), 2, replace=False)
        ]
        text = render(annotate.build_chain(template_teacher, X, X_D, D_d, TRUTH))
        lengths.append(len(text.split()))
        assert abs(lengths[-1] - annotate.target_words(2 * s)) <= 8
    assert lengths == sorted(set(lengths))


def test_the_offline_teacher_speaks_of_every_type():
    for name in DEGRADATIONS:
        chain = annotate.build_chain(
            template_teacher, X, X_D, [Degradation(name, 0.5)], TRUTH
        )
        assert name in chain.influence and "a wagon" in chain.conclusion
    assert annotate.build_chain(template_teacher, X, X, [], TRUTH).degradations == []


def test_llama_factory_form(built):
    """Its own names for roles (from, human, gpt) are the default, so no tags need be named."""
    rows = json.loads((built.out / "llamafactory.json").read_text())
    info = json.loads((built.out / "dataset_info.json").read_text())["rr1"]
    assert info["file_name"] == "llamafactory.json" and len(rows) == 12
    assert info["columns"] == {"messages": "conversations", "images": "images"}
    for row, ours in zip(rows, built.rows):
        user, assistant = row["conversations"]
        assert (user["from"], assistant["from"]) == ("human", "gpt")
        assert row["conversations"] == ours["conversations"]
        assert user["value"].count("<image>") == len(row["images"]) == 1
        assert (built.out / row["images"][0]).is_file()
    theirs = records.read(built.out / "llamafactory.json")
    assert [record["response"] for record in theirs] == [
        row["conversations"][1]["value"] for row in built.rows
    ]


def test_the_data_card_counts_what_is_there(built):
    card = (built.out / "card.txt").read_text()
    types = Counter(d["type"] for row in built.rows for d in row["degradations"])
    assert (
        f"12 questions, {types.total()} degradations" in card and "8 with choices" in card
    )
    for stage, names in STAGES.items():
        assert (
            f"{stage} {sum(types[name] for name in names)}: "
            + ", ".join(f"{name} {types[name]}" for name in names)
            in card
        )
    assert float(card.split("correlation with total intensity ")[1].split(";")[0]) > 0.9
    picture = cv2.imread(str(built.out / "card.png"))
    assert picture.shape[1] > 800 and picture.std() > 10


def test_workers_and_limit_do_not_change_a_question(built, questions, tmp_path):
    assert build(questions, tmp_path, "--workers", 1, "--limit", 5) == built.rows[:5]
    assert build(questions, tmp_path, "--workers", 3) == built.rows  # goes on where it was
    assert (tmp_path / "train.jsonl").read_bytes() == (
        built.out / "train.jsonl"
    ).read_bytes()
    with pytest.raises(SystemExit, match="other settings:\n  high: was 4, now 2\n"):
        build(questions, tmp_path, "--high", 2)


def test_half_a_line_at_the_end_is_cut_off(built, questions, tmp_path):
    build(questions, tmp_path, "--limit", 3)
    whole = (tmp_path / "train.jsonl").read_bytes()
    (tmp_path / "train.jsonl").write_bytes(whole + whole[:50])
    assert build(questions, tmp_path, "--limit", 4) == built.rows[:4]


def test_seed_types_and_words_can_be_chosen(built, questions, tmp_path):
    few = build(questions, tmp_path / "few", "--low", 2, "--high", 2, "--limit", 3)
    assert all(len(row["degradations"]) == 2 for row in few)
    other = build(questions, tmp_path / "other", "--seed", 1, "--limit", 3)
    assert [row["degradations"] for row in other] != [
        row["degradations"] for row in built.rows[:3]
    ]
    short = build(questions, tmp_path / "short", "--words", 20, 5, "--limit", 3)
    words = [
        [len(row["conversations"][1]["value"].split()) for row in rows[:3]]
        for rows in (short, built.rows)
    ]
    assert all(a < b for a, b in zip(*words))


@pytest.mark.parametrize("script", ["train_sft", "train_grpo"])
def test_both_trainers_take_the_data(script, built, checkpoint, tmp_path):
    flags = {
        "train_sft": "--batch 3 --micro-batch 3",
        "train_grpo": "--prompts 2 --group-size 2 --max-new-tokens 4",
    }[script]
    main = __import__(script).main
    main(
        [
            "--model",
            checkpoint,
            "--data",
            f"{built.out}/train.jsonl",
            "--part",
            "all",
            "--steps",
            "1",
            "--out",
            str(tmp_path / "run"),
            *flags.split(),
        ]
    )
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_photos_with_questions_in_the_fields_of_a_okvqa(tmp_path):
    if not PHOTOS.is_dir():
        pytest.skip("the photos with questions are not here")
    rows = build(PHOTOS / "questions.jsonl", tmp_path, "--limit", 3)
    source = [
        json.loads(line)
        for line in (PHOTOS / "questions.jsonl").read_text().splitlines()[:3]
    ]
    assert [(row["id"], row["answer"], row["choices"]) for row in rows] == [
        (q["question_id"], str(q["correct_choice_idx"]), q["choices"]) for q in source
    ]
    assert records.read(tmp_path / "train.jsonl")[0]["clean_image"].endswith(".jpg")


# ---------------------------------------------------------------- reading questions


def test_a_okvqa_json(tmp_path):
    (tmp_path / "val2017").mkdir()
    for number in (7, 9):
        cv2.imwrite(
            str(tmp_path / f"val2017/{number:012}.jpg"), np.zeros((8, 8, 3), np.uint8)
        )
    common = {"split": "val", "question": "what is it? "}
    rows = [
        common
        | {
            "image_id": 7,
            "question_id": "a",
            "choices": ["cat", "dog"],
            "correct_choice_idx": 1,
            "direct_answers": ["hound"],
        },
        common
        | {"image_id": 9, "question_id": "b", "direct_answers": ["cat", "dog", "dog"]},
    ]
    (tmp_path / "aokvqa.json").write_text(json.dumps(rows))
    first, second = read_questions(tmp_path / "aokvqa.json")
    assert first == (
        "a",
        tmp_path / "val2017/000000000007.jpg",
        Truth("what is it?", ["cat", "dog"], "1"),
    )
    assert second.truth == ("what is it?", None, "dog")


@pytest.mark.parametrize(
    "bad, message",
    [
        ('{"image": "0.png"', r"2: not JSON"),
        ('{"image": "0.png", "answer": "cat"}', r"2: field 'question' is missing"),
        (
            '{"image": "none.png", "question": "?", "answer": "cat"}',
            r"2: there is no photo .*none.png: --images",
        ),
        (
            '{"image": "../outside.png", "question": "?", "answer": "cat"}',
            r"2: .*outside.png' leads to .*out of the image folder .*: move",
        ),
        ('{"image": "0.png", "question": "?"}', r"2: no answer; expected"),
        (
            '{"image": "0.png", "question": "?", "choices": ["a", "b"], "answer": "cat"}',
            r"2: answer 'cat' is none of the choices",
        ),
        (
            '{"image": "0.png", "question": "?", "choices": [1, 2], "answer": 1}',
            r"2: question is .*choices \[1, 2\]",
        ),
        ('{"image": "0.png", "question": "?", "answer": "<ANSWER>"}', r"2: .*tag"),
        (
            '{"image": "0.png", "question": "?", "answer": "x", "id": "q0"}',
            r"2: the id 'q0' is that of .*:1 too",
        ),
        ("[1]", r"2: holds '\[1\]'; expected an object"),
    ],
)
def test_a_bad_question_is_named_by_file_and_line(questions, tmp_path, bad, message):
    (questions.parent.parent / "outside.png").write_bytes(
        (questions.parent / "0.png").read_bytes()
    )
    (tmp_path / "bad.jsonl").write_text(
        questions.read_text().splitlines()[0] + "\n" + bad + "\n"
    )
    with pytest.raises(records.DataError, match="bad.jsonl:" + message):
        read_questions(tmp_path / "bad.jsonl", str(questions.parent))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--low 3 --high 2", "--low 3 --high 2"),
        ("--words 40", "two numbers"),
        ("--base-url http://x", "--teacher"),
        ("--teacher m --max-cost 1 --base-url http://x", "--price-in"),
        ("--teacher m", "OPENAI_API_KEY"),
    ],
)
def test_a_command_line_that_cannot_be_meant(
    questions, tmp_path, flags, message, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if message == "OPENAI_API_KEY":
        pytest.importorskip("openai")
    with pytest.raises(SystemExit, match=message):
        build(questions, tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists(), "other settings can be tried at once"


def test_a_broken_photo_is_rejected_and_the_rest_goes_on(questions, tmp_path):
    for photo in questions.parent.glob("*.png"):
        (tmp_path / photo.name).write_bytes(
            photo.read_bytes()[: 200 if photo.name == "1.png" else None]
        )
    (tmp_path / "q.jsonl").write_text(questions.read_text())
    rows = build(tmp_path / "q.jsonl", tmp_path / "out", "--limit", 3)
    (rejected,) = read_lines(tmp_path / "out" / "rejected.jsonl")
    assert (
        [row["id"] for row in rows] == ["q0", "q2"]
        and rejected["id"] == "q1"
        and "1.png" in rejected["reason"]
    )
    assert len(build(tmp_path / "q.jsonl", tmp_path / "out", "--limit", 3)) == 2
    (tmp_path / "1.png").write_bytes((questions.parent / "1.png").read_bytes())
    assert len(build(tmp_path / "q.jsonl", tmp_path / "out", "--limit", 3)) == 3
    assert read_lines(tmp_path / "out" / "rejected.jsonl") == []


# ---------------------------------------------------------------- a teacher over HTTP


@pytest.fixture
def server(monkeypatch):
    with serving(monkeypatch) as server:
        yield server


def chat_teacher(model, server, folder):
    return teachers.ChatTeacher(ChatClient(model, server.url), folder / "answers.jsonl")


def test_four_requests_a_question_and_none_when_all_is_done(server, questions, tmp_path):
    rows = build(
        questions,
        tmp_path,
        *flags(server, "--price-in", 2, "--price-out", 10, "--max-tokens", 77),
    )
    assert [(r.step, len(r.pictures), r.model, r.max_tokens) for r in server.log] == [
        (step, n, "m", 77) for _ in rows for step, n in zip(teachers.STEPS, (2, 1, 0, 0))
    ]
    clean, damaged = (
        cv2.imdecode(
            np.frombuffer(base64.b64decode(url.partition("base64,")[2]), np.uint8),
            cv2.IMREAD_COLOR,
        )[..., ::-1]
        for url in server.log[0].pictures
    )
    record = records.read(tmp_path / "train.jsonl")[0]
    for sent, kept in ((clean, record["clean_image"]), (damaged, record["image"])):
        assert np.abs(sent.astype(int) - np.asarray(records.open_image(kept))).mean() < 8
    assert (
        record["chain"].influence == good_answer(server.log[0].prompt)
        and record["teacher"] == "m"
    )
    receipts = read_lines(tmp_path / "answers.jsonl")
    assert len(receipts) == 8 and all(
        r["cost"] == pytest.approx(0.003) and r["tokens_in"] == 1000 for r in receipts
    )
    assert (
        "8 answers of m: 8000 + 800 tokens, $0.0240" in (tmp_path / "card.txt").read_text()
    )
    assert build(questions, tmp_path, *flags(server)) == rows and len(server.log) == 8
    assert (
        len(build(questions, tmp_path, *flags(server, "--limit", 3))) == 3
        and len(server.log) == 12
    )


def test_half_an_answer_on_file_is_asked_for_again(server, questions, tmp_path):
    rows = build(questions, tmp_path, *flags(server))
    receipts = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").write_bytes(
        receipts[:-30]
    )  # torn in the middle of writing
    (tmp_path / "train.jsonl").unlink()
    assert build(questions, tmp_path, *flags(server)) == rows and len(server.log) == 9
    assert (tmp_path / "answers.jsonl").read_bytes() == receipts


def test_429_500_garbage_and_silence_are_waited_out(server, questions, tmp_path):
    trouble = [429, 500, "html", "odd", "odd", "never", 503, 429]
    server.behave = lambda request: (
        trouble[request.number // 2]
        if request.number % 2 == 0 and request.number < 16
        else "ok"
    )
    rows = build(questions, tmp_path, *flags(server, "--timeout", 0.4))
    assert (
        len(rows) == 2
        and len(server.log) == 16
        and len(read_lines(tmp_path / "answers.jsonl")) == 8
    )
    assert max(Counter(server.paid).values()) == 1


def test_a_server_that_stays_away_is_given_up_and_gone_back_to(server, questions, tmp_path):
    server.behave = lambda request: 500
    with pytest.raises(
        SystemExit,
        match="(?s)stopped answering .*asked 2 times, last: HTTP 500.*0 of 12 questions.*goes on",
    ):
        build(questions, tmp_path, *flags(server, "--limit", 0, "--retries", 1))
    assert len(server.log) <= 8 and read_lines(tmp_path / "rejected.jsonl") == []
    server.behave = lambda request: "ok"
    assert len(build(questions, tmp_path, *flags(server))) == 2


def test_one_question_without_an_answer_does_not_stop_the_others(
    server, questions, tmp_path
):
    server.behave = lambda request: 500 if request.number < 2 else "ok"
    with pytest.raises(SystemExit, match="1 questions are left undone"):
        build(questions, tmp_path, *flags(server, "--retries", 1))
    assert [row["id"] for row in read_lines(tmp_path / "train.jsonl")] == ["q1"]
    assert [row["id"] for row in build(questions, tmp_path, *flags(server))] == ["q0", "q1"]


def test_a_refused_key_stops_at_once_and_is_shown_nowhere(
    server, questions, tmp_path, capsys
):
    server.behave = lambda request: 401
    with pytest.raises(
        SystemExit, match="key in OPENAI_API_KEY was not accepted"
    ) as stopped:
        build(questions, tmp_path, *flags(server))
    assert len(server.log) == 1 and "secret" in server.log[0].key
    server.behave = lambda request: 400  # the error text repeats the key
    build(questions, tmp_path, *flags(server))
    assert (
        len(read_lines(tmp_path / "rejected.jsonl")) == 2
        and "[key]" in (tmp_path / "rejected.jsonl").read_text()
    )
    written = "".join(
        path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file()
    )
    captured = capsys.readouterr()
    assert "secret" not in written + captured.out + captured.err + str(stopped.value)


def test_a_model_that_wants_max_completion_tokens_gets_it(server, questions, tmp_path):
    server.behave = lambda request: 400 if request.max_tokens else "ok"
    rows = build(questions, tmp_path, *flags(server, "--max-tokens", 77, "--retries", 0))
    assert len(rows) == 2 and [request.max_tokens for request in server.log] == [77] + 8 * [
        None
    ]
    assert json.loads(server.log[1].body)["max_completion_tokens"] == 77


def test_an_unknown_model_stops_at_once(server, questions, tmp_path):
    server.behave = lambda request: 404
    with pytest.raises(SystemExit, match="no model 'm' at http://127.0.0.1"):
        build(questions, tmp_path, *flags(server))
    assert len(server.log) == 1


BAD = {
    "cut off": {"finish_reason": "length"},
    "refused": {"message": {"role": "assistant", "content": None, "refusal": "no"}},
    "refused ": {"finish_reason": "content_filter"},
    "a tag is lost": {
        "message": {"role": "assistant", "content": "<TYPE>noise(0.1)<TYPE_END>"}
    },
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_answer_is_rejected_kept_and_asked_for_again_only_on_request(
    server, questions, tmp_path, reason
):
    step = "length" if "tag" in reason else "reasoning"
    server.behave = lambda request: (
        BAD[reason]
        if request.step == step and sum(r.step == step for r in server.log) <= 2
        else "ok"
    )
    first = 3 if step == "length" else 1  # answers before the bad one
    assert build(questions, tmp_path, *flags(server, "--limit", 1)) == []
    (row,) = read_lines(tmp_path / "rejected.jsonl")
    assert (
        (row["id"], row["step"]) == ("q0", step)
        and reason.strip() in row["reason"]
        and len(server.log) == first + 1
    )
    build(questions, tmp_path, *flags(server, "--limit", 1))
    assert len(server.log) == first + 1  # not asked again by itself
    build(questions, tmp_path, *flags(server, "--limit", 1, "--retry-rejected"))
    assert len(server.log) == first + 2 and read_lines(tmp_path / "rejected.jsonl")[0][
        "attempts"
    ] == {step: 1}
    assert (
        len(build(questions, tmp_path, *flags(server, "--limit", 1, "--retry-rejected")))
        == 1
    )
    assert (
        len(server.log) == 6 and read_lines(tmp_path / "rejected.jsonl") == []
    )  # 4 good answers and 2 bad ones, all on file
    assert len(read_lines(tmp_path / "answers.jsonl")) == 6


def test_max_cost_is_kept_and_gone_on_from(server, questions, tmp_path):
    prices = ("--price-in", 1, "--price-out", 10, "--max-tokens", 100)  # $0.002 an answer
    with pytest.raises(SystemExit, match=r"--max-cost 0.0101 is reached: \$0.0100 spent"):
        build(questions, tmp_path, *flags(server, *prices, "--max-cost", 0.0101))
    assert len(server.log) == 5
    with pytest.raises(SystemExit, match="is reached"):
        build(questions, tmp_path, *flags(server, *prices, "--max-cost", 0.0101))
    assert len(server.log) == 5
    assert len(build(questions, tmp_path, *flags(server, *prices, "--max-cost", 1))) == 2
    assert len(server.log) == 8 and max(Counter(server.paid).values()) == 1


def test_many_at_once_and_no_more_than_allowed_a_minute(server, questions, tmp_path):
    server.slow = 0.05
    build(questions, tmp_path / "fast", *flags(server, "--workers", 4, "--limit", 4))
    assert 2 <= server.most_open <= 4
    paced = ChatClient("m", server.url, per_minute=600)
    start = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        times = sorted(
            pool.map(lambda _: paced._wait_for_turn() or time.monotonic() - start, range(6))
        )
    assert all(0.1 * n - 0.01 <= t for n, t in enumerate(times))
    server.slow, server.log = 0.0, []
    build(
        questions,
        tmp_path / "paced",
        *flags(server, "--workers", 4, "--limit", 1, "--per-minute", 300),
    )
    assert len(server.log) == 4 and server.log[-1].time - server.log[0].time >= 0.5


def test_the_same_thing_is_asked_once(server, tmp_path):
    teacher = chat_teacher("m", server, tmp_path)
    asked = [teacher("conclusion", reasoning="rails", truth=TRUTH) for _ in range(3)]
    assert len(set(asked)) == 1 and len(server.log) == 1
    teacher("conclusion", attempt=1, reasoning="rails", truth=TRUTH)
    assert len(server.log) == 2


def test_the_key_of_an_answer_is_model_prompt_pictures_and_attempt(server, tmp_path):
    ask = [chat_teacher(model, server, tmp_path) for model in ("m", "n")]
    keys = [
        ask[0].key("p", [X, X_D], 0),
        ask[1].key("p", [X, X_D], 0),
        ask[0].key("q", [X, X_D], 0),
        ask[0].key("p", [X_D, X], 0),
        ask[0].key("p", [X.reshape(8, 6, 3), X_D], 0),
        ask[0].key("p", [X, X_D], 1),
    ]
    assert len(set(keys)) == 6 and keys[0] == ask[0].key("p", [X.copy(), X_D], 0)


def test_a_dry_run_shows_the_prompts_and_asks_and_writes_nothing(
    server, questions, tmp_path, capsys
):
    command.main(
        [
            "--data",
            str(questions),
            "--out",
            str(tmp_path / "out"),
            "--dry-run",
            *map(str, flags(server)),
        ]
    )
    text = capsys.readouterr().out
    assert not server.log and not (tmp_path / "out").exists()
    assert (
        "2 to do, 4 answers each, by m" in text
        and "--- influence: pictures of 112 x 112 and 112 x 112 pixels" in text
    )
    assert all(f"--- {step}" in text for step in teachers.STEPS) and "True answer:" in text


# ---------------------------------------------------------------- killed at any moment


def test_sigkill_at_any_moment_loses_no_paid_answer_and_pays_for_none_twice(
    server, questions, tmp_path
):
    """What has reached the process is on file and never asked again; only requests that were under
    way at the kill are."""
    everything = ("--limit", 8, "--workers", 4)
    undisturbed = build(questions, tmp_path / "calm", *flags(server, *everything))
    calm, out, under_way = set(server.paid), tmp_path / "killed", 0
    assert len(server.log) == len(calm) == 32
    server.log, server.paid, server.answers = [], [], out / "answers.jsonl"

    # at known moments of a request: before the reply, in it, right after it, when it is on file
    for moment, turn in (("before", 3), ("during", 2), ("after", 4), ("once on file", 2)):
        last = len(server.log) + turn - 1

        def behave(request):
            if request.number == last:
                server.number_on_file = server.on_file()
                if moment == "before":
                    server.kill()
            return f"kill {moment}" if request.number == last else "ok"

        server.behave = behave
        process = start(server, questions, out, "--limit", 8)
        process.join(30)
        under_way += moment != "once on file"
        assert process.exitcode == -signal.SIGKILL, moment
        assert len(server.paid) - server.on_file() <= under_way, moment

    # at any time, with four requests under way
    server.behave, server.slow = lambda request: "ok", 0.02
    for requests in (3, 6):
        before, process = len(server.log), start(server, questions, out, *everything)
        while len(server.log) < before + requests and process.is_alive():
            time.sleep(0.002)
        process.kill()
        process.join(30)
        time.sleep(0.1)  # the server ends what it has begun
        under_way += 4
        assert len(server.paid) - server.on_file() <= under_way

    assert build(questions, out, *flags(server, *everything)) == undisturbed
    assert (out / "train.jsonl").read_bytes() == (
        tmp_path / "calm" / "train.jsonl"
    ).read_bytes()
    receipts = Counter(row["key"] for row in read_lines(out / "answers.jsonl"))
    assert (
        len(receipts) == 32 and set(receipts.values()) == {1} and set(server.paid) == calm
    )
    assert len(server.paid) - 32 <= under_way
    asked = len(server.log)
    assert (
        build(questions, out, *flags(server, *everything)) == undisturbed
        and len(server.log) == asked
    )


def test_every_flag_is_read():
    text = "".join(path.read_text() for path in Path(command.__file__).parent.glob("*.py"))
    assert not [f.name for f in fields(command.Config) if f"config.{f.name}" not in text]


def test_the_commands_of_the_data_page_can_be_given():
    page = (Path(command.__file__).parents[2] / "docs" / "use" / "data.md").read_text()
    commands = re.findall("python -m rr1.annotate ([^#\n]+)", page.replace("\\\n", " "))
    assert len(commands) >= 6
    for line in commands:
        command.check(command.parse_config(command.Config, line.split()))
