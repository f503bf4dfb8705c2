"""The tables of bench/u1.py from hand-made scores and predictions."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import judge
import u1
from rr1.chain import Chain, render
from rr1.evaluation import metrics
from rr1.tiny import world


def pictures_scores(n: int = 30) -> dict[str, dict[str, np.ndarray]]:
    """In no order; stage I gains .3 in SSIM where it was low, .1 in the middle, loses .05 above."""
    ssim = np.random.default_rng(0).permutation(np.linspace(0.1, 0.9, n))
    gain = np.select([ssim < 0.36, ssim < 0.64], [0.3, 0.1], -0.05)
    rows = {"damaged": ssim, "clean": np.ones(n), "stage I": ssim + gain}
    rows["stage II, seed 0"] = ssim + gain + 0.02
    scores = {}
    for name, values in rows.items():
        scores[name] = {
            "psnr": 20 + 10 * values,
            "ssim": values,
            "r_sem": values,
            "reward": 1.2 * values,
            "read": (values > 0.5) * 1.0,
        }
    return scores


def test_what_recovery_gains_by_hand():
    text = u1.report.table(pictures_scores(), "stage I", u1.MEASURES)
    assert "30 damaged pictures" in text
    stage_1, stage_2 = (
        next(line for line in text.splitlines() if line.startswith(f"| {name}"))
        for name in ("stage I ", "stage II, seed 0")
    )
    assert f"**{(0.3 + 0.1 - 0.05) / 3:+.3f} [" in stage_1
    assert "**+0.020 [+0.020, +0.020]**" in stage_2 and "**+0.200 [" in stage_2
    for third, gain in (("most damaged", 0.3), ("middle", 0.1), ("least damaged", -0.05)):
        line = next(
            line for line in text.splitlines() if line.startswith(f"| {third} third")
        )
        assert f"**{gain:+.3f} [{gain:+.3f}, {gain:+.3f}]**" in line
        assert f"**{10 * gain:+.3f} [{10 * gain:+.3f}, {10 * gain:+.3f}]**" in line


def test_the_judge_counts_things_that_are_right_in_shape_and_colour():
    scenes = [world.sample_scene(np.random.default_rng(i)) for i in range(6)]
    truth = judge.things(scenes)
    assert truth.shape == (6, 2, 2)
    assert [int((row < len(judge.KINDS)).sum()) for row in truth] == [
        len(s.things) for s in scenes
    ]
    wrong = truth.clone()
    first = (truth[0] < len(judge.KINDS)).nonzero()[0]
    wrong[0, first[0], first[1]] = (truth[0, first[0], first[1]] + 1) % len(judge.KINDS)

    def reader(pictures):
        return torch.nn.functional.one_hot(wrong, len(judge.KINDS) + 1).permute(0, 3, 1, 2)

    expected = [1 - 1 / len(scenes[0].things)] + [1] * 5
    assert judge.read_right(reader, torch.zeros(6, 3, 8, 8), truth) == pytest.approx(
        expected
    )
    assert judge.new_judge()(torch.rand(2, 3, 32, 32)).shape == (
        2,
        len(judge.KINDS) + 1,
        2,
        2,
    )


def answers(correct: int, n: int = 200) -> list[dict]:
    """n judged rows, of which the first `correct` are right."""
    rows = []
    for i in range(n):
        chain = Chain([("noise", 0.5)], "i", "r", "c", int(i >= correct))
        row = {
            "key": str(i),
            "form": "choice",
            "choices": ["a", "b"],
            "answer": "0",
            "shown": "as is",
            "plain": False,
            "degradations": [{"type": "noise", "intensity": 0.5}],
            "response": render(chain),
            "length": 50,
            "truth_length": 50,
            "truncated": False,
        }
        rows.append(metrics.judge(row))
    return rows


def test_the_tables_of_stage_3_by_hand():
    """Both pictures answer ten of 200 more than one, with a chain and without; the rest as many."""
    more = ("both", "chain-both")
    models = {name: answers(160 if name in more else 150) for name in [*u1.ROWS, "sum"]}
    now, less = u1.answer_tables(models).split("Each less the same")
    assert "200 held-out damaged scenes" in now and "0.750 [0.686, 0.805] n 200" in now
    for title in ("the question: I_c, I_r", "a chain: I_c, I_r"):
        assert "**+0.050 [" in next(
            line for line in less.splitlines() if f"| {title} " in line
        )
    for title in ("a chain: I_c, I_c", u1.SUM):
        line = next(line for line in less.splitlines() if f"| {title} " in line)
        assert "+0.000 [+0.000, +0.000]" in line
    with pytest.raises(SystemExit, match="same records"):
        u1.answer_tables(models | {"both": models["both"][:-1]})


def test_logits_of_two_pictures_are_added(tmp_path, monkeypatch):
    """The damaged picture says b by 1, the recovered one a by 2: together a."""
    monkeypatch.setattr(u1, "write_shown", lambda out, split, kind: kind)
    monkeypatch.setattr(u1.records, "read", lambda kind: [kind])
    processor = SimpleNamespace(response_ids=lambda text: [ord(text)])
    monkeypatch.setattr(u1.vlm, "load", lambda name: (None, processor))
    monkeypatch.setattr(u1.data, "load_batch", lambda rows, processor, plain: rows[0])
    monkeypatch.setattr(u1.data, "encode", lambda model, batch: batch)

    def group_logps(model, kind, options):
        likely = {"c": [-2.0, -1.0], "r": [-1.0, -3.0]}[kind]
        return torch.tensor(likely)[:, None], torch.ones(2, 1), None

    monkeypatch.setattr(u1.vlm, "group_logps", group_logps)
    [row] = u1.added_logits([answers(0, n=1)[0] | {"plain": True}], tmp_path)
    assert row["response"] == "a" and row["score"] == 1


def test_records_show_what_is_asked_for(tmp_path):
    """Other pictures in a line of a recovered data set: a mark for each, and no clean picture."""
    folder = tmp_path / "pairs" / "test"
    folder.mkdir(parents=True)
    chain = {"from": "gpt", "value": "chain"}
    line = {
        "id": "7",
        "image": ["d.png", "r.png"],
        "clean_image": "x.png",
        "answer": "red",
        "conversations": [{"from": "human", "value": "<image><image>what color?"}, chain],
    }
    (folder / "test.jsonl").write_text(json.dumps(line) + "\n")
    expected = {
        "c": ["d.png"],
        "cr": ["d.png", "r.png"],
        "cx": ["d.png", "x.png"],
        "cc": ["d.png", "d.png"],
    }
    for kind, pictures in expected.items():
        [shown] = map(
            json.loads, u1.write_shown(tmp_path, "test", kind).read_text().splitlines()
        )
        assert shown["image"] == pictures
        assert "clean_image" not in shown and shown["answer"] == "red"
        human = {"from": "human", "value": "<image>" * len(pictures) + "what color?"}
        assert shown["conversations"] == [human, chain]
