"""The tables of bench/ from hand-made predictions, and the processes of two of them on next to nothing."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig

import gpu
import learning
import runs
import table_3
import u1_recovery as recovery
import u1_stage_3 as stage_3
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


# ---------------------------------------------------------------- bench/u1_stage_3.py

def test_records_show_what_is_asked_for(tmp_path):
    """One line of a recovered data set, with other pictures: as many marks as pictures, and no clean picture to be asked about again."""
    (tmp_path / "pairs" / "test").mkdir(parents=True)
    line = {"id": "7", "image": ["d.png", "r.png"], "clean_image": "x.png", "answer": "red",
            "conversations": [{"from": "human", "value": "<image><image>what color?"}, {"from": "gpt", "value": "chain"}]}
    (tmp_path / "pairs" / "test" / "test.jsonl").write_text(json.dumps(line) + "\n")
    for kind, pictures in {"c": ["d.png"], "cr": ["d.png", "r.png"], "cx": ["d.png", "x.png"], "cc": ["d.png"] * 2}.items():
        [shown] = map(json.loads, stage_3.write_shown(tmp_path, "test", kind).read_text().splitlines())
        assert shown["image"] == pictures and "clean_image" not in shown and shown["answer"] == "red"
        assert shown["conversations"] == [{"from": "human", "value": "<image>" * len(pictures) + "what color?"}, {"from": "gpt", "value": "chain"}]


def test_the_table_of_stage_3_by_hand():
    """The recovered picture answers ten of 200 more than the chain alone; all others answer as it does."""
    models = {name: list(answers(100, .5, 150 + 10 * (name == "recovered"))) for name in stage_3.ROWS}
    result = stage_3.compare(models)
    assert result["n"] == 200 and result["now"]["chain"]["choice"]["value"] == 0.75 and result["now"]["chain"]["choice mid"]["n"] == 200
    assert result["now"]["chain"]["open"]["n"] == 0 and "chain" not in result["less_chain"]
    assert result["less_chain"]["recovered"]["choice"]["value"] == pytest.approx(0.05) and result["less_chain"]["twice"]["choice"]["value"] == 0
    text = stage_3.report(result)
    assert "| recovered (stage 3): I_c, I_r |" in text and "**+0.050 [" in text and "0.750 [0.686, 0.805] n 200" in text
    with pytest.raises(SystemExit, match="same records"):
        stage_3.compare(models | {"base": models["base"][:-1]})


# ---------------------------------------------------------------- recovery

def recovery_scores(n: int = 30) -> dict[str, dict[str, np.ndarray]]:
    """Pictures in no order; what is recovered gains .3 in SSIM where it was low, .1 in the middle and loses .05 where it was high."""
    ssim = np.random.default_rng(0).permutation(np.linspace(.1, .9, n))
    gain = np.select([ssim < .36, ssim < .64], [.3, .1], -.05)
    row = lambda ssim: {"ssim": ssim, "psnr": 20 + 10 * ssim, "r_sem": ssim, "reward": 1.2 * ssim, "read": (ssim > .5) * 1.0}
    rows = {"damaged": ssim, "clean": np.ones(n), "stage I, equidistant": ssim, "stage I": ssim + gain, "grpo-0": ssim + gain + .02, "control-0": ssim + gain + .03}
    return {name: row(ssim) for name, ssim in rows.items()}


def test_what_recovery_gains_by_hand():
    result, text = recovery.report(recovery_scores(), [0], {"grpo-0": 300.4, "control-0": 299})
    assert result["gain"]["stage I"]["ssim"]["value"] == pytest.approx((.3 + .1 - .05) / 3)
    assert result["gain"]["grpo-0"]["ssim"]["value"] == pytest.approx(.02) and result["stage_2_less_control"]["0"]["ssim"]["value"] == pytest.approx(-.01)
    for (name, third), gain in zip(result["by_damage"].items(), (.3, .1, -.05), strict=True):
        assert third["ssim"]["value"] == pytest.approx(gain) and third["ssim"]["n"] == 10 and third["psnr"]["value"] == pytest.approx(10 * gain)
        assert f"| {name} " in text and f"**{gain:+.3f} [{gain:+.3f}, {gain:+.3f}]**" in text
    assert [third["ssim"]["damaged"] for third in result["by_damage"].values()] == sorted(third["ssim"]["damaged"] for third in result["by_damage"].values())
    assert "| 300     |" in text and "30 held-out" in text


# ---------------------------------------------------------------- bench/grpo.py

def test_our_side_of_the_grpo_benchmark(tmp_path):
    """One turn in a process of its own, as beside TRL: one picture and one prompt a group, and every count that the report asks for."""
    import grpo
    small = grpo.CONFIGURATIONS["tiny"] | {"groups": 2, "G": 4, "new": 8, "layers": 2}
    (tmp_path / "tiny").mkdir()
    grpo.write_inputs(tmp_path / "tiny", small, 1)
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r}); import grpo; grpo.CONFIGURATIONS['tiny'] = {small!r}; "
            f"grpo.main(['--worker', 'ours', '--configurations', 'tiny', '--rounds', '1', '--out', {str(tmp_path)!r}])")
    done = subprocess.run([sys.executable, "-c", code], input="go\n", capture_output=True, text=True, timeout=300)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("STEP ")]
    step = json.loads(line.removeprefix("STEP "))
    counts, sizes = step["counts"], json.loads((tmp_path / "tiny" / "sizes.json").read_text())
    assert counts["images preprocessed"] == counts["images through the vision tower"] == 2
    assert {counts[f"tokens projected, {phase}"] for phase in grpo.PHASES} == {2 * 4 * 8}
    n = {phase: counts[f"tokens through the language model, {phase}"] for phase in grpo.PHASES}                  # two layers, the second in part
    prefilled = counts["prompt tokens prefilled"]
    assert counts["tokens through feed-forward parts, rollout"] == prefilled + 2 + 2 * (n["rollout"] - prefilled)
    assert {counts[f"tokens through feed-forward parts, {phase}"] - n[phase] for phase in ("score", "update")} == {2 * 4 * 8}
    assert counts["tokens through the language model, rollout"] == counts["prompt tokens prefilled"] + 2 * 4 * 7
    assert set(step["seconds"]) == {"step", *grpo.PHASES} and step["matrix_rate"] > 0
    text = grpo.report("tiny", {"ours": [step], "peer": [step]}, sizes)
    assert "| images preprocessed " in text and "| 1.00" in text and "GFLOP/s" in text


# ---------------------------------------------------------------- bench/gpu.py

def test_the_sizes_of_the_3b_model_are_those_of_its_checkpoint():
    if not REAL.is_dir():
        pytest.skip("needs the published config.json of Qwen2.5-VL-3B")
    published, ours = Qwen2_5_VLConfig.from_pretrained(REAL).to_dict(), Qwen2_5_VLConfig(**gpu.QWEN_3B).to_dict()
    for part in ("text_config", "vision_config"):
        assert {name: ours[part].get(name) for name in gpu.QWEN_3B[part]} == {name: published[part].get(name) for name in gpu.QWEN_3B[part]}
        assert published[part].keys() - {"architectures", "transformers_version"} <= ours[part].keys()
        assert not {name: (value, ours[part][name]) for name, value in published[part].items()
                    if value != ours[part][name] and name in ("hidden_act", "layer_types", "temporal_patch_size", "in_channels", "use_sliding_window")}
    assert all(ours[name] == published[name] for name in gpu.QWEN_3B if not name.endswith("_config"))


def test_operations_of_an_update_are_those_that_pytorch_counts():
    """Of the weights: a forward pass of one packed row. PyTorch counts the blocks of attention whole; those are left to the formula."""
    policy, *_ = gpu.make_models("tiny", torch.device("cpu"))
    (prompt,), G, L = gpu.make_prompts(policy, gpu.make_picture(policy, (112, 112)), 1), 3, 5
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gpu.vlm.group_logps(policy, [prompt], [[[400] * L] * G])
    counted = sum(n for operator, n in counter.get_flop_counts()["Global"].items() if operator in (torch.ops.aten.mm, torch.ops.aten.addmm))
    text, P = policy.config.text_config, len(prompt.ids)
    pairs = sum(range(1, P + 1)) + G * sum(range(P + 1, P + L + 1))
    assert gpu.update_operations(text, P, G, L) == 3 * (counted + text.num_hidden_layers * 4 * text.hidden_size * pairs)


def test_gpu_stops_at_the_first_size_that_does_not_fit(tmp_path, monkeypatch, capsys):
    real, tried = gpu.step, []

    def step(models, rt, new_tokens, **case):
        tried.append((case["G"], case["picture"]))
        if case["G"] > 100 or case["picture"][0] > 4000:
            raise torch.OutOfMemoryError
        if not case["checkpointing"]:
            raise RuntimeError("no kernel\nfor this")
        return real(models, rt, new_tokens, **case | {"G": 2, "picture": (112, 112)})
    monkeypatch.setattr(gpu, "step", step)
    gpu.main(["--sizes", "tiny", "--new-tokens", "2", "--rounds", "1", "--parts", "largest", "modes", "--out", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out and tried[-5:] == [(8, (640, 480))] * 5
    assert tried[:-5] == [(64, (640, 480))] * 2 + [(128, (640, 480))] + [(8, (2560, 1920))] * 2 + [(8, (3840, 2880))] * 2 + [(8, (5120, 3840))]
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "does not fit" in lines["G 128"] and "does not fit" in lines["5120 x 3840"] and "does not fit" not in lines["G 64"]
    assert "| RuntimeError: no kernel " in lines["no --gradient-checkpointing"]
    assert "G 256" not in lines and "--capture" not in lines and "without sharing" in lines
    with pytest.raises(SystemExit, match="--parts nothing: unknown"):
        gpu.main(["--parts", "nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_3b_sizes_ask_for_a_gpu():
    with pytest.raises(SystemExit, match="this needs a GPU"):
        gpu.main([])
