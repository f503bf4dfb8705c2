"""The tables of bench/ from hand-made predictions, and the processes of two of them on next to nothing."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import learning
import runs
import table_3
from rr1 import tiny
from rr1.evaluation import metrics
from rr1.chain import Chain, render
from rr1.tiny import world

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "qwen2.5-vl-3b"


# ---------------------------------------------------------------- bench/learning.py

def answers(named, intensity, correct, n=200):
    """n judged rows; the first `named` name the true type, at this intensity (truth 0.5), the first `correct` answer rightly."""
    for i in range(n):
        chain = Chain([("noise", intensity)] if i < named else [("lens blur", .5)], "i", "r", "c", int(i >= correct))
        yield metrics.judge({"key": str(i), "form": "choice", "choices": ["a", "b"], "answer": "0", "shown": "as is", "plain": False,
                             "degradations": [{"type": "noise", "intensity": .5}], "response": render(chain), "length": 50,
                             "truth_length": 50, "truncated": False})


def test_the_table_of_learning_by_hand():
    """GRPO names more types than the control, at a worse intensity, and answers two points worse than SFT."""
    models = {"sft": list(answers(100, .6, 150)), "grpo-0": list(answers(140, .7, 146)), "control-0": list(answers(110, .6, 150))}
    result = learning.compare({"sampled": models, "greedy": {name: models["sft"] for name in models}}, [0])
    assert result["n"] == 200
    r_deg = lambda named, intensity: (named * (1 - abs(intensity - .5)) - 2 * (200 - named)) / 200
    sampled = result["sampled"]
    assert sampled["gain"]["grpo-0"]["r_deg"]["value"] == pytest.approx(r_deg(140, .7) - r_deg(100, .6))
    assert sampled["rl_less_control"]["0"]["r_deg"]["value"] == pytest.approx(r_deg(140, .7) - r_deg(110, .6))
    assert sampled["gain"]["grpo-0"]["intensity_error"]["value"] == pytest.approx(0.1)
    assert sampled["gain"]["grpo-0"]["choice_accuracy"]["value"] == pytest.approx(-0.02)
    assert learning.wins(sampled["rl_less_control"], "r_deg") == (1, 0)
    assert learning.wins(sampled["rl_less_control"], "intensity_error") == (0, 1)
    assert learning.wins(result["greedy"]["rl_less_control"], "r_deg") == (0, 0)
    kept = {text: learning.holds(sampled, measure, rule, 0) for text, (measure, rule) in learning.CHECKS.items()}
    assert list(kept.values()) == [True, False, False, True, False, True]
    text = learning.report(result | {"training_seconds": {"grpo-0": 480.2, "control-0": 481}}, [0])
    assert "| GRPO less more SFT, seed 0 | **+0." in text and "| 480 " in text and "GRPO, seed 0" in text
    with pytest.raises(SystemExit, match="same records"):
        learning.compare({"sampled": models | {"grpo-0": models["sft"][:-1]}}, [0])


def test_the_control_gets_the_same_seconds(tmp_path):
    for name, rows in (("grpo-3", [{"step": i, "seconds/rollout": 2.0, "seconds/update": 1.0, "tokens_per_second": 99} for i in range(10)]),
                       ("probe-3", [{"step": i, "seconds": 9.0 if i < 2 else 0.5, "tokens_per_second": 99} for i in range(12)])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert learning.control_steps(tmp_path, 3) == 60
    assert not runs.finished(tmp_path / "grpo-3", 10)
    (tmp_path / "grpo-3" / "model").mkdir()
    (tmp_path / "grpo-3" / "model" / "config.json").write_text("{}")
    (tmp_path / "grpo-3" / "config.json").write_text('{"steps": 10}')
    assert runs.finished(tmp_path / "grpo-3", None) and runs.finished(tmp_path / "grpo-3", 10)
    with pytest.raises(SystemExit, match="run of 10 steps"):
        runs.finished(tmp_path / "grpo-3", 20)


@pytest.mark.slow
def test_learning_from_end_to_end(checkpoint, tmp_path, monkeypatch, capsys):
    """All its processes, on next to nothing; run again it trains and asks nothing."""
    monkeypatch.chdir(tmp_path)
    world.write(tiny.WORLD, train=48, test=16)
    ask = ["--model", checkpoint, "--seeds", "0", "--steps", "2", "--grpo=--prompts 2 --group-size 2 --max-new-tokens 8", "--jobs", "2"]
    learning.main(ask)
    first = capsys.readouterr().out
    assert all(f"{name}: done" in first for name in ("grpo-0", "probe-0", "control-0", "sampled", "greedy"))
    assert "GRPO less more SFT, seed 0" in first and Path("runs/learning/report.json").is_file()
    learning.main(ask)
    second = capsys.readouterr().out
    assert "grpo-0: " not in second and second.partition("held-out")[2] == first.partition("held-out")[2]
    with pytest.raises(SystemExit, match="failed with status"):
        learning.main([*ask[:2], "--seeds", "5", "--grpo=--no-such-flag"])


# ---------------------------------------------------------------- bench/table_3.py

def made(form="choice", s=.5, n=40, right=20, named=None, key="", length=50):
    """n judged rows on a picture of noise s; the first `right` are right, the first `named` name the damage at 0.1 too much (of a
    model asked without a chain: None)."""
    words = {"choice": ("0", "1"), "open": ("red", "blue"), "caption": ("a red star", "b")}[form]
    for i in range(n):
        said = words[i >= right]
        chain = None if named is None else Chain([("noise", s + .1)] if i < named else [], "i", "r", *((said,) if form == "caption" else ("c", said)))
        yield metrics.judge({"key": f"{key}{form}{s}{i}", "form": form, "choices": ["a", "b"] if form == "choice" else None, "answer": words[0],
                             "shown": "as is", "plain": chain is None, "degradations": [{"type": "noise", "intensity": s}],
                             "response": said if chain is None else render(chain), "length": length, "truth_length": 50, "truncated": False})


def six(**changes):
    """All models answer 40 choice questions in the mid cell and 20 captions in the low one; what is not changed is as `full` is."""
    def rows(right=20, captions=10, named=40, length=50):
        return [*made(right=right, named=named, length=length), *made("caption", .2, 20, captions, named, length=length)]
    plain = {"base": {"named": None}, "no-reasoning": {"named": None}}
    return {name: rows(**plain.get(name, {}), **changes.get(name.replace("-", "_"), {})) for name in table_3.TITLES}


def test_table_3_by_hand():
    """Each model differs from `full` in one thing, and in nothing else."""
    models = six(base={"right": 10}, no_r_len={"length": 80}, no_r_deg={"named": 20}, sft={"captions": 20})
    result = table_3.compare({"greedy": models, "sampled": six()})
    assert result["n"] == 60
    now, less = result["greedy"]["now"], result["greedy"]["less_full"]
    assert now["full"]["choice mid"]["value"] == 0.5 and now["full"]["choice mid"]["n"] == 40 and now["full"]["choice low"]["n"] == 0
    assert now["full"]["overall"]["value"] == pytest.approx((0.5 + now["full"]["caption low"]["value"]) / 2)
    assert now["full"]["r_deg"]["value"] == pytest.approx(0.9) and now["no-r_deg"]["r_deg"]["value"] == pytest.approx((40 * .9 - 20) / 60)
    assert "r_deg" not in now["base"] and now["base"]["length"]["value"] == 50

    def moved(name):
        return {column for column, e in less[name].items() if e["n"] and (e["low"] > 0 or e["high"] < 0)}
    assert moved("base") == {"choice mid", "overall", "per question"} and less["base"]["choice mid"]["value"] == pytest.approx(-0.25)
    assert less["base"]["overall"]["value"] == pytest.approx(-0.125) and less["base"]["per question"]["value"] == pytest.approx(-10 / 60)
    assert moved("no-r_len") == {"length", "r_len"} and less["no-r_len"]["length"]["value"] == pytest.approx(30)
    assert moved("no-r_deg") == {"r_deg", "type_f1"} and moved("no-reasoning") == set()
    assert moved("sft") == {"caption low", "overall", "per question"}
    assert all(e["n"] == 0 or e["value"] == 0 for model in result["sampled"]["less_full"].values() for e in model.values())

    text = table_3.report(result | {"training_seconds": {"full": 361.4}})
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6 and all(title in tables[0] for title in table_3.TITLES.values()) and "full 361 s" in text
    [base] = [line for line in tables[0].splitlines() if line.startswith("| base")]
    cells = dict(zip([c.strip() for c in tables[0].splitlines()[0].split("|")], [c.strip() for c in base.split("|")]))
    assert cells["choice mid"] == "0.250" and cells["choice low"] == cells["r_deg"] == "-" and cells["length"] == "50.000"
    assert "0.250 [0.142, 0.402] n 40" in tables[1] and "**-0.250 [" in tables[2] and "Greedy" in text.split("\n\n")[1]


def test_what_table_3_cannot_compare():
    models = six()
    with pytest.raises(SystemExit, match="greedy: sft and full did not answer the same records"):
        table_3.compare({"greedy": models | {"sft": models["sft"][:-1]}})
    with pytest.raises(SystemExit, match="greedy: no damaged picture"):
        table_3.compare({"greedy": dict.fromkeys(models, [])})
    with pytest.raises(SystemExit, match="held-out records"):
        table_3.main(["--data", "train.jsonl", "--evaluate=--batch 16"])


def test_a_folder_is_gone_on_with_only_as_it_was_begun(tmp_path):
    config = table_3.Config(out=str(tmp_path / "t"), steps=3, jobs=2)
    free = {"out", "jobs"}
    assert runs.begin(config, free) == tmp_path / "t" == runs.begin(table_3.Config(out=config.out, steps=3), free)
    with pytest.raises(SystemExit, match=r"other settings:\n  grpo: was '', now '--lr 1'\n"):
        runs.begin(table_3.Config(out=config.out, steps=3, grpo="--lr 1"), free)


@pytest.mark.slow
@pytest.mark.parametrize("shipped", [True, False])
def test_table_3_from_end_to_end(checkpoint, tmp_path, monkeypatch, capsys, shipped):
    """All its processes, on next to nothing, from the shipped weights and from a model of one's own; run again it trains and asks nothing."""
    monkeypatch.chdir(tmp_path)
    folder = world.write(tiny.WORLD, train=48, test=16)
    ask = ["--steps", "2", "--jobs", "2", "--sft=--batch 4 --micro-batch 4", "--grpo=--prompts 2 --group-size 2 --max-new-tokens 8",
           "--evaluate=--limit 8 --max-new-tokens 8" + ("" if shipped else f" --data {folder}/test.jsonl")]
    ask += [] if shipped else ["--model", checkpoint, "--data", f"{folder}/train.jsonl", "--images", str(folder)]
    table_3.main(ask)
    first = capsys.readouterr().out
    names = [*table_3.REWARDS, "no-reasoning", "greedy", "sampled"] + ([] if shipped else ["sft"])
    assert all(f"{name}: done" in first for name in names) and ("sft: " in first) != shipped
    configs = {name: json.loads(Path("runs/table_3", name, "config.json").read_text()) for name in (*table_3.REWARDS, "no-reasoning")}
    assert {name: config.get("rewards") for name, config in configs.items()} == {**table_3.REWARDS, "no-reasoning": None}
    assert configs["no-reasoning"]["plain"] and {config["steps"] for config in configs.values()} == {2}
    plain = [json.loads(line)["plain"] for name in ("no-reasoning", "sft") for line in open(f"runs/table_3/greedy/{name}/predictions.jsonl")]
    assert plain == [True] * 8 + [False] * 8
    table_3.main(ask)
    second = capsys.readouterr().out
    assert "full: " not in second and second.partition("held-out")[2] == first.partition("held-out")[2]
