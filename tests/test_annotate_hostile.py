"""Building a data set from files that people wrote, at an endpoint that does its worst.

No truth is ever changed, no paid answer lost or wasted, and whoever waits is told why. The numbers
in brackets are those of the review that found each fault.
"""

import base64
import gzip
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import cv2
import numpy as np
import pytest
from endpoint import Raw, completion, flags, good_answer, serving, start, write_questions
from matplotlib.figure import Figure
from PIL import Image

from rr1 import client, records
from rr1.annotate import __main__ as command
from rr1.annotate import card, target_words, work
from rr1.annotate.questions import read_questions
from rr1.annotate.teachers import STEPS
from rr1.files import read_lines


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def server(monkeypatch):
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    monkeypatch.setattr(card.Card, "figure", lambda _: Figure((1, 1)))


def build(questions, out, *flags):
    command.main(["--data", str(questions), "--out", str(out), *map(str, flags)])
    return read_lines(out / "train.jsonl")


def ask(questions, tmp_path, *rows):
    """The questions that these lines hold, about one of the photos."""
    path = tmp_path / "asked.jsonl"
    common = {"image": "0.png", "question": "how many dogs?"}
    path.write_text(
        "".join(json.dumps(common | row) + "\n" for row in rows), encoding="utf-8"
    )
    return read_questions(path, str(questions.parent))


# ---------------------------------------------------------------- a truth is never changed


@pytest.mark.parametrize(
    "choices, answer, index",
    [
        (["1", "2", "3", "4"], "2", 1),
        (["2", "3", "4", "1"], "1", 3),
        (["B", "A", "C"], "A", 1),
        (["1.5", "15", "5"], "15", 1),
        (["cat", "dog"], 1, 1),
        (["cat", "dog"], "1", 1),
        (["cat", "dog"], "B", 1),
        (["cat", "dog"], " Dog. ", 1),
        (["2", "1", "0"], 1, 1),
    ],
)
def test_an_answer_is_first_of_all_a_choices_text_3(
    questions, tmp_path, choices, answer, index
):
    [source] = ask(questions, tmp_path, {"choices": choices, "answer": answer})
    assert source.truth.answer == str(index) and source.truth.answer_text == choices[index]


def test_the_answer_of_most_people_is_a_text_too_3(questions, tmp_path):
    row = {"choices": ["1", "2", "3"], "direct_answers": ["2", "2", "3"]}
    [source] = ask(questions, tmp_path, row)
    assert source.truth.answer_text == "2"


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"choices": ["1", "2", "3", "4"], "answer": 2},
            'and another one\'s index: write "2"',
        ),
        ({"answer": None}, "no answer; expected"),
        ({"answer": ""}, "no answer; expected"),
        ({"answer": ["cat"]}, "no answer; expected"),
        ({"choices": ["a", "b"], "answer": None, "correct_choice_idx": None}, "no answer"),
        (
            {"choices": ["a", "b"], "correct_choice_idx": 2},
            "correct_choice_idx is 2, of 2 choices",
        ),
        ({"choices": "dog", "answer": "d"}, "choices 'dog'; expected a text, and a list"),
        ({"choices": ["dog", ""], "answer": "dog"}, "none of them empty"),
        ({"question": " ", "answer": "dog"}, "none of them empty"),
        (
            {"question": "what is in <image>?", "answer": "dog"},
            "none of them .*with <image>",
        ),
    ],
)
def test_what_is_no_answer_and_no_question_is_refused_3_12_24(
    questions, tmp_path, row, message
):
    with pytest.raises(records.DataError, match=f"asked.jsonl:1: .*{message}"):
        ask(questions, tmp_path, row)


def test_edited_questions_are_noticed_one_by_one_9(server, tmp_path):
    """A line in front, a corrected answer, a question taken out, another photo: nothing is lost,
    nothing done twice, and what has not changed is not paid for again."""
    rows = [
        json.loads(line) for line in write_questions(tmp_path).read_text().splitlines()[:5]
    ]
    rows = [{name: row[name] for name in row if name != "id"} for row in rows]

    def annotated():
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        server.log = []
        built = build(tmp_path / "q.jsonl", tmp_path / "out", *flags(server, "--limit", 0))
        turns = [row["conversations"][0]["value"].removeprefix("<image>") for row in built]
        assert [turn.splitlines()[0] for turn in turns] == [row["question"] for row in rows]
        assert len({row["id"] for row in built}) == len(rows)
        return built, len(server.log)

    before, asked = annotated()
    assert asked == 20
    rows.insert(0, {"image": "7.png", "question": "what is new?", "answer": "this"})
    after, asked = annotated()
    assert asked == 4 and after[1:] == before
    rows[1]["answer"] = "a mistake that was corrected"
    corrected, asked = annotated()
    assert asked >= 1 and corrected[1]["answer"] == "a mistake that was corrected"
    assert corrected[2:] == before[1:]
    del rows[2]
    assert annotated() == ([*corrected[:2], *corrected[3:]], 0)
    photo = (tmp_path / rows[3]["image"]).read_bytes()
    (tmp_path / rows[3]["image"]).write_bytes((tmp_path / "9.png").read_bytes())
    _, asked = annotated()
    assert 1 <= asked <= 4
    (tmp_path / rows[3]["image"]).write_bytes(photo)
    assert annotated()[1] == 0, "its answers are still on file"


# ---------------------------------------------------------------- no paid answer is lost or wasted


@pytest.mark.parametrize(
    "finish, content, reason",
    [
        ("length", None, "cut off"),
        ("content_filter", None, "refused"),
        ("stop", None, "empty"),
        ("stop", [], "empty"),
        ("stop", {"a": 1}, "empty"),
    ],
)
def test_an_answer_without_text_is_paid_for_once_4(
    server, questions, tmp_path, finish, content, reason
):
    message = {
        "message": {"role": "assistant", "content": content},
        "finish_reason": finish,
    }
    server.behave = lambda request: message
    prices = ("--price-in", 1, "--price-out", 1)
    for _ in range(2):
        assert build(questions, tmp_path, *flags(server, "--limit", 3, *prices)) == []
        assert len(server.log) == 3 and len(read_lines(tmp_path / "answers.jsonl")) == 3
    rejected = read_lines(tmp_path / "rejected.jsonl")
    assert all(row["step"] == "influence" and reason in row["reason"] for row in rejected)
    assert sum(
        row["cost"] for row in read_lines(tmp_path / "answers.jsonl")
    ) == pytest.approx(3 * 1100 / 1e6)


def test_an_answer_in_parts_is_one_text_4(server, questions, tmp_path):
    def parts(request):
        answer = good_answer(request.prompt)
        content = [
            {"type": "text", "text": answer[:9]},
            {"type": "text", "text": answer[9:]},
        ]
        return {"message": {"role": "assistant", "content": content}}

    server.behave = parts
    in_parts = build(questions, tmp_path / "parts", *flags(server))
    server.behave = lambda request: "ok"
    assert (
        in_parts == build(questions, tmp_path / "whole", *flags(server))
        and len(in_parts) == 2
    )


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": None, "completion_tokens": 7},
        {"prompt_tokens": "many"},
        [],
        3,
    ],
)
def test_what_is_counted_oddly_is_on_disk_all_the_same_13(
    server, questions, tmp_path, usage
):
    def behave(request):
        return Raw(
            200, json.dumps(json.loads(completion(request.prompt)) | {"usage": usage})
        )

    server.behave = behave
    assert len(build(questions, tmp_path, *flags(server, "--price-out", 1))) == 2
    receipts = read_lines(tmp_path / "answers.jsonl")
    assert len(receipts) == len(server.log) == 8 and receipts[0]["tokens_in"] == 0


def test_half_an_emoji_is_written_13(server, questions, tmp_path):
    def behave(request):
        body = json.loads(completion(request.prompt))
        if request.step != "length":
            body["choices"][0]["message"]["content"] = "a wagon \ud83d on rails"
        return Raw(200, json.dumps(body))

    server.behave = behave
    rows = build(questions, tmp_path, *flags(server))
    assert len(rows) == 2 and len(server.log) == 8
    assert "a wagon ? on rails" in rows[0]["conversations"][1]["value"]


def test_answers_of_every_odd_form_are_read_or_asked_for_again_13(
    server, questions, tmp_path
):
    odd = [
        "null",
        "3",
        "[]",
        '{"choices": {}}',
        '{"choices": [null]}',
        '{"choices": [{}]}',
        "",
    ]
    odd += [
        '{"choices": [{"message": null}]}',
        '{"error": {"message": "busy"}}',
        "[" * 99_999,
    ]

    def behave(request):
        return Raw(200, odd[request.number]) if request.number < len(odd) else "ok"

    server.behave = behave
    assert len(build(questions, tmp_path, *flags(server, "--retries", len(odd)))) == 2
    assert (
        len(server.log) == 8 + len(odd) and len(read_lines(tmp_path / "answers.jsonl")) == 8
    )


@pytest.mark.parametrize("wait", ["inf", "nan", "-5", "soon", "1e400", ""])
def test_a_strange_retry_after_is_a_short_wait_13(server, questions, tmp_path, wait):
    def behave(request):
        return Raw(429, "{}", {"Retry-After": wait}) if request.number == 0 else "ok"

    server.behave = behave
    try:
        assert len(build(questions, tmp_path, *flags(server))) == 2
    except SystemExit as error:  # more seconds than a float holds: too long to wait for
        assert wait == "1e400" and "no answer came" in str(error)
        assert len(build(questions, tmp_path, *flags(server))) == 2


def test_a_wait_of_a_day_is_not_waited_for_20(server, questions, tmp_path, capsys):
    server.behave = lambda request: Raw(429, "{}", {"Retry-After": "86400"})
    begin = time.monotonic()
    with pytest.raises(SystemExit, match="asked 1 times, .*asks to wait for 86400 seconds"):
        build(questions, tmp_path, *flags(server))
    assert time.monotonic() - begin < 10
    assert (
        "m: HTTP 429 from the server, which asks to wait for 86400 s"
        in capsys.readouterr().err
    )


def test_long_waits_say_why_20(server, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(client, "SAY_EVERY", 0.0)
    trouble = {0: 503, 1: "never", 2: 429}
    server.behave = lambda request: trouble.get(request.number, "ok")
    assert len(build(questions, tmp_path, *flags(server, "--timeout", 0.5))) == 2
    said = capsys.readouterr().err
    for line in (
        "HTTP 503",
        "HTTP 429 from the server, which asks",
        "asking again, 2 of 6 times",
    ):
        assert line in said


def test_a_reply_that_drips_is_given_up_and_asked_for_again_20(server, questions, tmp_path):
    """Each byte comes in time, all of them would take half a minute."""
    trouble = {1: "drip", 3: "drip"}
    server.behave = lambda request: trouble.get(request.number, "ok")
    begin = time.monotonic()
    assert len(build(questions, tmp_path, *flags(server, "--timeout", 0.5))) == 2
    assert time.monotonic() - begin < 15 and len(server.log) == 10
    server.behave = lambda request: "drip"
    limits = ("--timeout", 0.3, "--retries", 1)
    with pytest.raises(SystemExit, match="2 times what came was .* not whole in time"):
        build(questions, tmp_path / "never", *flags(server, *limits))


@pytest.mark.parametrize(
    "trouble",
    [
        402,
        Raw(429, json.dumps({"error": {"message": "pay", "code": "insufficient_quota"}})),
    ],
)
def test_out_of_money_stops_and_the_same_command_goes_on_5(
    server, questions, tmp_path, trouble
):
    server.behave = lambda request: "ok" if request.number < 5 else trouble
    with pytest.raises(SystemExit, match="(?s)no money left.*1 of 12 questions .* goes on"):
        build(questions, tmp_path, *flags(server, "--limit", 0, "--retries", 1))
    assert len(server.log) <= 8 and read_lines(tmp_path / "rejected.jsonl") == []
    server.behave, server.log = lambda request: "ok", []
    assert len(build(questions, tmp_path, *flags(server, "--limit", 0))) == 12
    assert len(server.log) == 48 - 5


@pytest.mark.parametrize("workers", [1, 4])
def test_what_the_server_refuses_of_all_stops_and_goes_on_5(
    server, questions, tmp_path, workers
):
    """An error that holds for all requests does not use up the questions."""
    server.behave = lambda request: Raw(400, '{"error": {"message": "no image input"}}')
    everything = ("--limit", 0, "--workers", workers)
    with pytest.raises(
        SystemExit, match="(?s)10 questions in a row.*HTTP 400: .*no image input"
    ):
        build(questions, tmp_path, *flags(server, *everything))
    assert read_lines(tmp_path / "answers.jsonl") == [] and len(server.log) <= 12
    server.behave = lambda request: "ok"
    assert len(build(questions, tmp_path, *flags(server, *everything))) == 12
    assert read_lines(tmp_path / "rejected.jsonl") == []


@pytest.mark.parametrize(
    "wrap",
    [
        "<think>\nOkay, the user wants me to lie.\n</think>\n\n{}",
        "Okay, I was told to think first.</think>{}",
        "```\n{}\n```",
        "```text\n{}\n```\n",
        "<thinking>first</thinking>\n```xml\n{}\n```",
    ],
)
def test_thinking_and_fences_are_taken_off_in_every_step_6(
    server, questions, tmp_path, wrap
):
    plain = build(questions, tmp_path / "plain", *flags(server, "--limit", 1))

    def behave(request):
        content = wrap.replace("{}", good_answer(request.prompt))
        return {"message": {"role": "assistant", "content": content}}

    server.behave = behave
    assert build(questions, tmp_path / "wrapped", *flags(server, "--limit", 1)) == plain


@pytest.mark.parametrize(
    "content", ["<think>Let me see", "Here it is:\n```\na wagon\n```", "```"]
)
@pytest.mark.parametrize("step", range(4))
def test_what_cannot_be_taken_off_is_rejected_at_that_step_6(
    server, questions, tmp_path, content, step
):
    def behave(request):
        bad = request.step == STEPS[step]
        return {"message": {"role": "assistant", "content": content}} if bad else "ok"

    server.behave = behave
    assert build(questions, tmp_path, *flags(server, "--limit", 1)) == []
    [row] = read_lines(tmp_path / "rejected.jsonl")
    assert (row["step"], len(server.log)) == (STEPS[step], step + 1)
    assert "code fence or unfinished thinking" in row["reason"]


def test_a_run_without_one_good_answer_stops_6(
    server, questions, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(work, "LOG_EVERY", 0.0)
    server.behave = lambda request: {
        "message": {"role": "assistant", "content": "I can't help."}
    }
    with pytest.raises(SystemExit, match="10 questions in a row were rejected, .*refused"):
        build(questions, tmp_path, *flags(server, "--limit", 0, "--price-out", 10))
    assert len(server.log) <= 11 and re.search(
        r"9/12 \[.*9 rejected, \$0.0", capsys.readouterr().err
    )


def test_rejections_among_good_ones_do_not_stop_6(server, questions, tmp_path):
    first = []

    def behave(request):
        first.append(request)
        bad = len(first) > 4
        return {"message": {"role": "assistant", "content": "I'm sorry"}} if bad else "ok"

    server.behave = behave
    assert len(build(questions, tmp_path, *flags(server, "--limit", 0))) == 1
    assert len(read_lines(tmp_path / "rejected.jsonl")) == 11


@pytest.mark.parametrize("workers", [1, 8, 64])
@pytest.mark.parametrize("dear", [False, True])
def test_max_cost_is_never_passed_18(server, tmp_path, workers, dear):
    """However many are under way, and where one answer costs five times the others."""
    path = write_questions(tmp_path)
    server.slow = 0.05

    def behave(request):
        long = dear and request.number == 5
        return Raw(200, completion(request.prompt, usage=(1000, 500 if long else 100)))

    server.behave = behave
    prices = ("--price-in", 1, "--price-out", 10, "--max-tokens", 500, "--max-cost", 0.05)
    with pytest.raises(
        SystemExit, match=r"--max-cost 0.05 is reached: \$0.0\d+ spent"
    ) as stopped:
        build(
            path,
            tmp_path / "o",
            *flags(server, *prices, "--limit", 0, "--workers", workers),
        )
    spent = sum(row["cost"] for row in read_lines(tmp_path / "o" / "answers.jsonl"))
    assert 0.05 - 0.0095 < spent <= 0.05 and f"${spent:.4f} spent" in str(stopped.value)
    assert len(server.log) == len(read_lines(tmp_path / "o" / "answers.jsonl"))


def test_one_process_a_folder_22(server, questions, tmp_path):
    server.slow = 0.2
    process = start(server, questions, tmp_path, "--limit", 2)
    while not server.log and process.is_alive():
        time.sleep(0.01)
    with pytest.raises(SystemExit, match="another process is writing to it"):
        build(questions, tmp_path, *flags(server))
    process.join(30)
    assert process.exitcode == 0 and len(server.log) == 8
    assert len(build(questions, tmp_path, *flags(server))) == 2


def test_limit_needs_the_photos_of_its_own_questions_23(questions, tmp_path):
    for name in ("0.png", "1.png", "2.png"):
        (tmp_path / name).write_bytes((questions.parent / name).read_bytes())
    (tmp_path / "q.jsonl").write_text(questions.read_text())
    assert len(build(tmp_path / "q.jsonl", tmp_path / "out", "--limit", 3)) == 3
    with pytest.raises(records.DataError, match="q.jsonl:4: there is no photo"):
        build(tmp_path / "q.jsonl", tmp_path / "out", "--limit", 4)


def test_a_photo_that_training_would_refuse_is_not_paid_for_24(server, tmp_path):
    cv2.imwrite(str(tmp_path / "strip.png"), np.zeros((2, 402, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "fine.png"), np.zeros((2, 400, 3), np.uint8))
    lines = [
        json.dumps({"image": f"{name}.png", "question": "what?", "answer": "black"})
        for name in ("strip", "fine")
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    assert len(build(tmp_path / "q.jsonl", tmp_path / "out", *flags(server))) == 1
    [row] = read_lines(tmp_path / "out" / "rejected.jsonl")
    assert "402 x 2 pixels" in row["reason"] and len(server.log) == 4


def test_a_dry_run_says_what_all_would_cost_27(questions, tmp_path, capsys):
    prices = ("--price-in", 2, "--price-out", 10, "--workers", 4, "--limit", 0)
    build(questions, tmp_path, "--teacher", "m", "--dry-run", *prices)
    said = capsys.readouterr().out.splitlines()[-1]
    words = said.replace(",", "").split()
    requests, tokens_in, tokens_out = (int(words[n]) for n in (0, 3, 7))
    assert requests == 48 and 12 * 3 * 1500 < tokens_in < 12 * 3 * 1500 + 48 * 1500
    assert f"about ${(2 * tokens_in + 10 * tokens_out) / 1e6:.2f}" in said
    assert "about 0.0 hours with --workers 4, if an answer takes 5 seconds" in said
    build(
        questions,
        tmp_path,
        "--teacher",
        "m",
        "--dry-run",
        "--limit",
        0,
        "--per-minute",
        0.1,
    )
    said = capsys.readouterr().out.splitlines()[-1]
    assert "--price-in and --price-out give dollars" in said and "about 8.0 hours" in said


# ---------------------------------------------------------------- pleasant


def in_a_shell(server, questions, out, *more):
    """The command in a process of its own, its first request sent."""
    flags_ = map(str, flags(server, *more))
    line = [
        sys.executable,
        "-m",
        "rr1.annotate",
        "--data",
        questions,
        "--out",
        out,
        *flags_,
    ]
    asked = len(server.log)
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    while len(server.log) == asked and process.poll() is None:
        time.sleep(0.01)
    return process


def test_ctrl_c_keeps_what_is_under_way_and_says_so_21(server, questions, tmp_path):
    server.slow = 0.5
    process = in_a_shell(server, questions, tmp_path)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "waiting for the answers under way" in said
    assert "stopped by Ctrl-C\n0 of 2 questions" in said and "Traceback" not in said
    assert len(read_lines(tmp_path / "answers.jsonl")) == len(server.paid) == 1
    server.slow = 0.0
    assert len(build(questions, tmp_path, *flags(server))) == 2 and len(server.log) == 8


def test_a_second_ctrl_c_stops_at_once_21(server, questions, tmp_path):
    server.behave = lambda request: "never"
    process = in_a_shell(server, questions, tmp_path, "--timeout", 60)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=10)[1]
    assert process.returncode == 130 and "Traceback" not in said


def test_an_error_in_the_questions_is_one_line_and_status_2(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"image": "0.png"}\n')
    line = [sys.executable, "-m", "rr1.annotate", "--data", tmp_path / "q.jsonl"]
    done = subprocess.run(
        [*line, "--out", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert (
        done.stderr
        == f"{tmp_path}/q.jsonl:1: field 'question' is missing; a question needs image, question "
        "and answer, or A-OKVQA's fields\n"
    )


def test_questions_in_unusual_but_legal_files_25(questions, tmp_path):
    row = {"image": "0.png", "question": "a\u2028b\u0085c?", "answer": "\u2028d"}
    text = json.dumps(row, ensure_ascii=False)
    for content in (
        text,
        "\ufeff" + text,
        text + "\r\n\r\n",
        f"\ufeff[{text}]",
        f"\n[\n{text}]",
    ):
        (tmp_path / "q.jsonl").write_bytes(content.encode())
        [source] = read_questions(tmp_path / "q.jsonl", str(questions.parent))
        assert source.truth == ("a\u2028b\u0085c?", None, "d")


@pytest.mark.parametrize(
    "content",
    ["caf\xe9".encode("latin-1"), gzip.compress(b"{}", mtime=0), "{}".encode("utf-16")],
)
def test_a_file_that_is_no_utf_8_is_named_25(tmp_path, content):
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(records.DataError, match="q.jsonl:1: not JSON in UTF-8"):
        read_questions(tmp_path / "q.jsonl")


def test_an_id_may_be_longer_than_the_name_of_a_file_25(questions, tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((questions.parent / name).read_bytes())
    ids = ["\u957f" * 40, "\u957f" * 40 + "\u4e00", "a/b c"]
    rows = [{"image": "0.png", "question": "what?", "answer": "x", "id": id} for id in ids]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = build(tmp_path / "q.jsonl", tmp_path / "out")
    assert [row["id"] for row in built] == ids and len({row["image"] for row in built}) == 3
    assert len(records.read(tmp_path / "out" / "train.jsonl")) == 3


def test_a_key_with_a_stray_newline_works_26(server, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-very-secret-8191\r\n")
    assert len(build(questions, tmp_path, *flags(server))) == 2
    assert server.log[0].key == "Bearer sk-very-secret-8191"
    for key in ("sk-\u201cquoted\u201d", "sk-two\nlines"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(
            SystemExit, match="OPENAI_API_KEY holds characters that no key has"
        ):
            build(questions, tmp_path, *flags(server))


# ---------------------------------------------------------------- pictures as a person sees them


def decoded(url):
    data = np.frombuffer(base64.b64decode(url.partition("base64,")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


def test_a_photo_is_seen_upright_and_sixteen_bits_are_scaled_7_11(server, tmp_path):
    """What the teacher is sent, what is damaged and what training opens is the same picture."""
    lying = Image.fromarray(np.zeros((8, 16, 3), np.uint8) + 90)
    exif = lying.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    lying.save(tmp_path / "phone.jpg", exif=exif)
    ramp = np.linspace(0, 65535, 128, dtype=np.uint16).reshape(8, 16)
    cv2.imwrite(str(tmp_path / "deep.png"), ramp)
    rows = [
        {"image": name, "question": "?", "answer": "x"}
        for name in ("phone.jpg", "deep.png")
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build(tmp_path / "q.jsonl", tmp_path / "out", *flags(server))
    asked = [request for request in server.log if request.step == "influence"]
    sent = [[decoded(url).shape[:2] for url in request.pictures] for request in asked]
    assert sent == [[(16, 8)] * 2, [(8, 16)] * 2]
    phone, deep = records.read(tmp_path / "out" / "train.jsonl")
    for record, size in ((phone, (8, 16)), (deep, (16, 8))):
        for name in ("image", "clean_image"):
            assert records.open_image(record[name]).size == size
    clean = np.asarray(records.open_image(deep["clean_image"]))[..., 0]
    assert np.abs(clean - ramp / 257.0).max() < 2


# ---------------------------------------------------------------- records without chains


def test_records_for_grpo_cost_nothing(questions, tmp_path):
    """Picture, damage, question, answer and the length to aim for by Eq. (7); nobody is asked."""
    rows = build(questions, tmp_path / "free", "--no-chains", "--tokens", 30, 20)
    assert not (tmp_path / "free" / "answers.jsonl").exists() and len(rows) == 12
    with_chains = build(questions, tmp_path / "chains")
    for row, other in zip(rows, with_chains):
        total = sum(d["intensity"] for d in row["degradations"])
        assert row["length"] == target_words(total, (30, 20)) and "teacher" not in row
        assert row["conversations"] == other["conversations"][:1]
        same = ("id", "degradations", "seed", "choices", "answer")
        assert all(row[name] == other[name] for name in same)
        folders = (tmp_path / "free", tmp_path / "chains")
        pictures = [(folder / row["image"]).read_bytes() for folder in folders]
        assert (
            pictures[0] == pictures[1]
            and (tmp_path / "free" / row["clean_image"]).is_file()
        )
    read = records.read(tmp_path / "free" / "train.jsonl")
    assert [record["length"] for record in read] == [row["length"] for row in rows]
    assert read[0]["response"] is None and read[1]["choices"] == rows[1]["choices"]
    with pytest.raises(SystemExit, match="--no-chains asks no teacher"):
        build(
            questions,
            tmp_path / "x",
            "--no-chains",
            "--teacher",
            "m",
            "--base-url",
            "http://x",
        )
    with pytest.raises(SystemExit, match="no_chains: was False, now True"):
        build(questions, tmp_path / "chains", "--no-chains")


# ---------------------------------------------------------------- everything at once


def test_a_hostile_endpoint_and_kills_together(server, questions, tmp_path):
    """Every answer that reached the process is on file once, whatever the server does and whenever
    the process is killed; what comes out is what an undisturbed run writes."""
    everything = ("--limit", 0, "--workers", 4)
    undisturbed = build(questions, tmp_path / "calm", *flags(server, *everything))
    rng, out = random.Random(0), tmp_path / "killed"
    server.log, server.paid, server.answers = [], [], out / "answers.jsonl"
    trouble = [
        429,
        500,
        "html",
        "odd",
        Raw(200, '{"cho'),
        Raw(502, "<html>"),
        Raw(429, "", {}),
    ]
    server.behave = lambda request: rng.choice(trouble) if rng.random() < 0.4 else "ok"
    server.slow = 0.01
    for kill in range(4):
        asked, process = len(server.log), start(server, questions, out, *everything)
        while len(server.log) < asked + 12 and process.is_alive():
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join(30)
        time.sleep(0.1)
    server.slow = 0.0
    for _ in range(5):
        try:
            rows = build(questions, out, *flags(server, *everything, "--retries", 20))
            break
        except SystemExit as error:
            assert "left undone" in str(error) or "stopped answering" in str(error)
    assert rows == undisturbed
    receipts = Counter(row["key"] for row in read_lines(out / "answers.jsonl"))
    assert len(receipts) == 48 and set(receipts.values()) == {1}
    assert 48 <= len(server.paid) <= 48 + 4 * 4, (
        "only what was under way at a kill is asked anew"
    )
