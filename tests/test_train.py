"""The two training scripts, a few steps of each on a small random model: what they leave, what
their flags change, how they stop and go on, and that several processes do what one does."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.modeling_utils
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import train_grpo
import train_sft
from degrade import Degradation
from rr1 import (
    data,
    doctor,
    grpo,
    records,
    rewards,
    rollout,
    run_folder,
    runtime,
    tiny,
    training,
    vlm,
)

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sft": train_sft, "grpo": train_grpo}
SMALL = {
    "sft": "--steps 2 --batch 6 --micro-batch 6 --lr 1e-3 --warmup 1",
    "grpo": "--steps 2 --prompts 3 --group-size 4 --max-new-tokens 12 --micro-batch 3 --lr 1e-3 "
    "--warmup 1",
}
PHASES = ("rollout", "score", "update")
CLOCKS = {"seconds", "tokens_per_second", *(f"seconds/{phase}" for phase in PHASES)}
both = pytest.mark.parametrize("script", SCRIPTS)


@dataclass
class Run:
    out: Path

    @property
    def rows(self) -> list[dict]:
        """metrics.jsonl without the clocks."""
        rows = [
            json.loads(line)
            for line in (self.out / "metrics.jsonl").read_text().splitlines()
        ]
        return [
            {key: value for key, value in row.items() if key not in CLOCKS} for row in rows
        ]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.out / "model" / "model.safetensors")

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.out / "checkpoints").iterdir())


class Lab:
    """Runs the scripts in this process; the same flags are run once."""

    def __init__(self, checkpoint, world_folder, folder):
        self.checkpoint, self.world, self.folder, self.done = (
            checkpoint,
            world_folder,
            folder,
            {},
        )

    def arguments(self, script: str, flags: str, out: Path) -> list[str]:
        return [
            "--model",
            self.checkpoint,
            "--data",
            f"{self.world}/train.jsonl",
            "--out",
            str(out),
            *SMALL[script].split(),
            *flags.split(),
        ]

    def new_folder(self) -> Path:
        return self.folder / f"run{len(list(self.folder.iterdir()))}"

    def run(self, script: str, flags: str = "") -> Run:
        if (script, flags) not in self.done:
            out = self.new_folder()
            SCRIPTS[script].main(self.arguments(script, flags, out))
            self.done[script, flags] = Run(out)
        return self.done[script, flags]

    def start(self) -> dict[str, torch.Tensor]:
        return load_file(Path(self.checkpoint) / "model.safetensors")

    def change(self, run: Run) -> torch.Tensor:
        """All that the run added to the weights, as one vector."""
        before, after = self.start(), run.weights
        return torch.cat([(after[name] - before[name]).flatten() for name in before])

    def apart(self, a: Run, b: Run) -> float:
        """How far two runs ended from each other, as a share of the way that they went."""
        return float((self.change(a) - self.change(b)).norm() / self.change(b).norm())


@pytest.fixture(scope="module")
def lab(checkpoint, world_folder, tmp_path_factory):
    return Lab(checkpoint, world_folder, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: None)


def equal(a: Run, b: Run) -> bool:
    return all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


# ---------------------------------------------------------------- what a run leaves behind


@both
def test_files_of_a_run(lab, script):
    run = lab.run(script)
    expected = {"config.json", "metrics.jsonl", "curves.png", "checkpoints", "model"} | (
        {"rollouts.jsonl"} if script == "grpo" else set()
    )
    assert {path.name for path in run.out.iterdir()} == expected
    assert run.checkpoints == ["step-000002"] and [row["step"] for row in run.rows] == [
        1,
        2,
    ]
    config = json.loads((run.out / "config.json").read_text())
    assert (
        config["steps"] == 2
        and config["lr"] == 1e-3
        and config.keys() == {f.name for f in fields(SCRIPTS[script].Config)}
    )
    assert all(
        isinstance(value, (int, float)) for row in run.rows for value in row.values()
    ), "every metric is finite"


def test_the_doctor_reads_what_the_scripts_write(lab):
    """A metric, an option or a field of rollouts.jsonl that is renamed fails here."""
    run = lab.run("grpo")
    names = set(doctor.read(run.out / "metrics.jsonl", doctor.numbers)[-1])
    assert {"step", "reward", *(f"seconds/{phase}" for phase in PHASES)} <= names
    options = json.loads((run.out / "config.json").read_text())
    for rule in doctor.RULES:
        assert rule.metric in names
        assert rule.advice.format_map(options)
    known = doctor.read(run.out / "rollouts.jsonl", doctor.response)
    assert len(known) == 2 * 2 * 4 and any(known)
    assert doctor.examine(run.out)
    sft = lab.run("sft").out
    names |= set(doctor.read(sft / "metrics.jsonl", doctor.numbers)[-1])
    assert "seconds" in names and doctor.examine(sft) == ["nothing found in 2 steps"]
    page = (ROOT / "docs/learn/questions.md").read_text()
    questions = re.findall(r"^## (\d+)\. (.*?)(?=^## |\Z)", page, re.M | re.S)
    assert [int(number) for number, _ in questions] == list(range(1, 16))
    for number, answer in questions:
        assert names & set(re.findall(r"`([\w/]+)`", answer)), f"question {number}"


def test_rollouts_can_be_read(lab):
    rows = [
        json.loads(line)
        for line in (lab.run("grpo").out / "rollouts.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 2 * 2 * 4, "two groups of each step"
    for row in rows:
        assert (
            row["truth"].startswith("<TYPE>")
            and Path(row["image"]).exists()
            and isinstance(row["response"], str)
        )
        assert row["reward"] == pytest.approx(row["deg"] + row["len"])
    group = [row["advantage"] for row in rows[:4]]
    assert (
        sum(group) == pytest.approx(0, abs=1e-5)
        and rows[0]["step"] == 1
        and rows[-1]["step"] == 2
    )


@both
def test_the_vision_tower_stands_and_the_language_model_moves(lab, script):
    before, after = lab.start(), lab.run(script).weights
    assert before.keys() == after.keys() and any("visual" in name for name in before)
    for name in before:
        assert torch.equal(before[name], after[name]) == ("visual" in name), name


@both
def test_the_model_that_is_written_is_an_ordinary_checkpoint(lab, script):
    run = lab.run(script)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(run.out / "model")
    ours, processor = vlm.load(str(run.out / "checkpoints" / "step-000002" / "model"))
    assert (
        AutoTokenizer.from_pretrained(run.out / "model")("<TYPE>noise(0.20)")["input_ids"]
        == processor.response_ids("<TYPE>noise(0.20)")[:-1]
    )
    ids = torch.tensor([processor.prompt_ids("what is it?", [])])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_sft_loss_is_the_mean_over_response_tokens_end_of_turn_included(lab, checkpoint):
    """The first row against the model's own forward, one record at a time."""
    model, processor = vlm.load(checkpoint)
    found = data.split(records.read(lab.world / "train.jsonl"), "sft")
    losses = []
    for i in data.batch_indices(len(found), 6, 0, seed=0):
        batch, response = (
            data.load_batch([found[i]], processor),
            processor.response_ids(found[i]["response"]),
        )
        ids = torch.tensor([batch.ids[0] + response])
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                pixel_values=batch.pixel_values,
                image_grid_thw=batch.grid_thw,
                mm_token_type_ids=(ids == processor.image_token_id).int(),
            ).logits[0, len(batch.ids[0]) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(
            logits, torch.tensor(response), reduction="none"
        ).tolist()
    first = lab.run("sft").rows[0]
    assert first["tokens"] == len(losses) and first["loss"] == pytest.approx(
        sum(losses) / len(losses), rel=1e-5
    )


# ---------------------------------------------------------------- ratio, KL, temperature


@pytest.mark.parametrize("T", [1.0, 0.7])
def test_before_the_first_update_ratio_is_1_kl_is_0_and_the_sampler_agrees_with_the_scorer(
    lab, no_plots, monkeypatch, T
):
    sampled, scored = [], []

    def sample(*args, **options):
        sampled.extend(
            rollout_of for group in sample_group(*args, **options) for rollout_of in group
        )
        return [sampled[i : i + 4] for i in range(0, len(sampled), 4)]

    def score(*args, **options):
        scored.append(group_logps(*args, **options))
        return scored[-1]

    sample_group, group_logps = rollout.sample_group, vlm.group_logps
    monkeypatch.setattr(rollout, "sample_group", sample)
    monkeypatch.setattr(vlm, "group_logps", score)
    run = Run(lab.new_folder())
    train_grpo.main(
        lab.arguments("grpo", f"--steps 1 --micro-batch 2 --temperature {T}", run.out)
    )
    assert run.rows[0]["ratio"] == 1.0 and run.rows[0]["kl"] == 0.0
    assert abs(run.rows[0]["loss"]) < 1e-6, "advantages of a group add up to 0"
    reference, policy = scored[:2], scored[2:]
    for (a, *_), (b, mask, _) in zip(reference, policy, strict=True):
        assert torch.equal(a, b)
    rows = [(row, int(m.sum())) for logps, mask, _ in policy for row, m in zip(logps, mask)]
    assert len(sampled) == len(rows) == 12
    for response, (row, length) in zip(sampled, rows):
        assert len(response.ids) == length
        torch.testing.assert_close(
            torch.tensor(response.logps), row[:length].detach(), rtol=0, atol=5e-5
        )


# ---------------------------------------------------------------- every flag changes something


def changed(lab, base, run):
    assert not equal(base, run)


def close(lab, base, run):
    assert lab.apart(run, base) < 1e-3
    for a, b in zip(base.rows, run.rows, strict=True):
        a, b = ({k: math.nan if v is None else v for k, v in row.items()} for row in (a, b))
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5, nan_ok=True)


def hardly_moved(lab, base, run):
    assert (
        lab.change(run).norm() < 0.2 * lab.change(base).norm()
        and run.rows[0]["grad_norm"] == base.rows[0]["grad_norm"]
    )


def has(**expected):
    """A check that metrics of the last row are as expected: numbers, or functions of (the base
    run's last row, this one's)."""

    def check(lab, base, run):
        changed(lab, base, run)
        for name, value in expected.items():
            row = run.rows[-1]
            assert (
                value(base.rows[-1], row)
                if callable(value)
                else row[name.replace("__", "/")] == value
            ), (name, row)

    return check


def without_kl(lab, base, run):
    changed(lab, base, run)
    assert "kl" in base.rows[0] and "kl" not in run.rows[0]


def two_checkpoints(lab, base, run):
    assert (
        equal(base, run)
        and run.checkpoints == ["step-000001", "step-000002"] != base.checkpoints
    )


def saves_pixels(least, most):
    """A check that the pictures have other sizes, and that every checkpoint says so: an evaluation
    afterwards will use the same."""

    def check(lab, base, run):
        changed(lab, base, run)
        for path in (run.out / "model", run.out / "checkpoints" / "step-000002" / "model"):
            size = vlm.Processor.from_pretrained(path).image_processor.size
            assert (size["shortest_edge"], size["longest_edge"]) == (least, most)

    return check


OFTEN = "--steps 1 --mu 2 --lr 2e-3"  # the second update of a rollout is far from the first

FLAGS = {
    "sft": [
        ("", "--plain", has(tokens=lambda a, b: b["tokens"] < a["tokens"] / 2)),
        ("", "--part rl", changed),
        ("", "--seed 1", changed),
        ("", "--lr 2e-3", has(lr=lambda a, b: b["lr"] == 2 * a["lr"])),
        ("", "--warmup 3", has(lr=lambda a, b: b["lr"] == pytest.approx(1e-3 * 2 / 3))),
        ("", "--weight-decay 0.5", changed),
        ("", "--max-grad-norm 1e-8", hardly_moved),
        ("", "--batch 3", has(tokens=lambda a, b: b["tokens"] < a["tokens"])),
        ("", "--micro-batch 4", close),
        ("", "--save-every 1", two_checkpoints),
        ("", "--save-every 0", lambda lab, base, run: equal(base, run)),
        ("", "--max-pixels 6272", saves_pixels(784, 6272)),
        ("", "--min-pixels 20000 --max-pixels 50000", saves_pixels(20000, 50000)),
    ],
    "grpo": [
        ("", "--part sft", changed),
        ("", "--seed 1", changed),
        ("", "--lr 2e-3", has(lr=lambda a, b: b["lr"] == 2 * a["lr"])),
        ("", "--warmup 3", has(lr=lambda a, b: b["lr"] == pytest.approx(1e-3 * 2 / 3))),
        ("", "--weight-decay 0.5", changed),
        ("", "--max-grad-norm 1e-8", hardly_moved),
        ("", "--micro-batch 1", close),
        ("", "--save-every 1", two_checkpoints),
        ("", "--save-every 0", lambda lab, base, run: equal(base, run)),
        ("", "--max-pixels 6272", saves_pixels(784, 6272)),
        ("", "--min-pixels 20000 --max-pixels 50000", saves_pixels(20000, 50000)),
        ("", "--prompts 2", changed),
        ("", "--group-size 2", changed),
        (
            "",
            "--rewards deg",
            has(len=lambda a, b: "reward/len" in a and "reward/len" not in b),
        ),
        (
            "",
            "--reward-weights 1 3",
            has(
                sum=lambda a, b: (
                    b["reward"] == pytest.approx(b["reward/deg"] + 3 * b["reward/len"])
                )
            ),
        ),
        ("", "--beta 0", without_kl),
        ("", "--beta 1", changed),
        (
            "",
            OFTEN,
            has(
                ratio=lambda a, b: a["ratio"] == 1 != b["ratio"],
                clip=lambda a, b: a["clip_low"] == 0 < b["clip_low"],
            ),
        ),
        (
            OFTEN,
            f"{OFTEN} --clip 0.9",
            has(clip=lambda a, b: b["clip_low"] < a["clip_low"]),
        ),
        (
            OFTEN,
            f"{OFTEN} --clip-high 9",
            has(clip_high=lambda a, b: a["clip_high"] > b["clip_high"]),
        ),
        ("", "--loss dr_grpo", changed),
        ("", "--loss dapo", changed),
        ("--loss dapo", "--loss dr_grpo", changed),
        ("", "--advantage rloo", changed),
        ("", "--mask-truncated", changed),
        (
            "",
            "--temperature 0.5",
            has(entropy=lambda a, b: b["entropy"] < a["entropy"] - 0.5),
        ),
        ("", "--max-new-tokens 6", has(length=lambda a, b: b["length"] <= 6 < a["length"])),
    ],
}
ELSEWHERE = {
    "model",
    "data",
    "out",
    "steps",
    "resume",
    "images",
    "tracker",
    "gradient_checkpointing",
    "skip_bad",
    "max_image_tokens",
    "shard",
    "workers",
    "eval_every",
    "eval_data",
    "eval_records",
}  # other tests, or every run


@pytest.mark.parametrize(
    "script, base, flags, check",
    [(script, *row) for script in FLAGS for row in FLAGS[script]],
    ids=[f"{script} {row[1]}" for script in FLAGS for row in FLAGS[script]],
)
def test_every_flag_changes_something(lab, no_plots, script, base, flags, check):
    check(lab, lab.run(script, base), lab.run(script, flags))


@both
def test_no_flag_is_forgotten_above(script):
    seen = {
        word[2:].replace("-", "_")
        for row in FLAGS[script]
        for word in row[1].split()
        if word.startswith("--")
    }
    if script == "sft":
        seen.add("max_new_tokens")  # of held-out answers
    assert seen | ELSEWHERE == {f.name for f in fields(SCRIPTS[script].Config)}


@both
def test_gradient_checkpointing_computes_again_and_ends_at_the_same_place(
    lab, no_plots, monkeypatch, script
):
    base, calls, checkpoint = lab.run(script), [], transformers.modeling_utils.checkpoint
    monkeypatch.setattr(
        transformers.modeling_utils,
        "checkpoint",
        lambda *args, **options: calls.append(1) or checkpoint(*args, **options),
    )
    # several parts a step: what they share must not be needed twice
    parts = {"sft": 3, "grpo": 2}[script]
    run = lab.run(script, "--gradient-checkpointing --micro-batch 2")
    assert len(calls) == 2 * parts * 2, (
        "two layers in each part of two steps; the frozen tower keeps nothing to compute again"
    )
    assert lab.apart(run, base) < 1e-4


@both
def test_images_may_lie_elsewhere_and_the_drawn_world_is_the_default(
    lab, no_plots, monkeypatch, script, tmp_path
):
    base = lab.run(script)
    shutil.copy(lab.world / "train.jsonl", tmp_path / "lines.jsonl")
    elsewhere = lab.run(script, f"--data {tmp_path}/lines.jsonl --images {lab.world}")
    with pytest.raises(records.DataError, match=f"{tmp_path}/images/.*cannot be read"):
        lab.run(script, f"--data {tmp_path}/lines.jsonl")
    monkeypatch.setattr(tiny, "WORLD", lab.world)
    arguments = lab.arguments(script, "", lab.new_folder())
    at = arguments.index("--data")
    SCRIPTS[script].main(arguments[:at] + arguments[at + 2 :])
    assert equal(base, elsewhere) and equal(
        base, Run(Path(arguments[arguments.index("--out") + 1]))
    )


@both
def test_bad_records_stop_a_run_or_are_left_out(lab, no_plots, script, tmp_path, capsys):
    """A broken line, a truncated picture and one too narrow for the model; a resumed run goes by
    the list that was written."""
    text = (lab.world / "train.jsonl").read_text().splitlines()
    for name in ("images", "clean"):
        shutil.copytree(lab.world / name, tmp_path / name)
    truncated, narrow = (tmp_path / json.loads(text[i])["image"] for i in (3, 5))
    truncated.write_bytes(truncated.read_bytes()[:300])
    Image.new("RGB", (1000, 2)).save(narrow)
    (tmp_path / "bad.jsonl").write_text("\n".join([text[0], "{broken", *text[1:]]))
    flags = f"--data {tmp_path}/bad.jsonl --part all"
    with pytest.raises(records.DataError, match=r"bad\.jsonl:2: not JSON"):
        lab.run(script, flags)
    with pytest.raises(
        records.DataError,
        match=r"train\.jsonl:\d+: .* takes 16 tokens, more than --max-image-tokens 15",
    ):
        lab.run(script, "--max-image-tokens 15")
    flags += " --skip-bad --max-image-tokens 16 --save-every 1"
    arguments = lab.arguments(script, flags, lab.new_folder())
    out = Path(arguments[arguments.index("--out") + 1])
    SCRIPTS[script].main([*arguments, "--steps", "1"])
    said = capsys.readouterr().out
    assert "3 bad records are left out" in said and f"{len(text) - 2} records from" in said
    listed = json.loads((out / "skipped.json").read_text())
    assert "bad.jsonl:2: not JSON" in listed["lines"][0] and set(listed["records"]) == {
        "3",
        "5",
    }
    assert "bad.jsonl:5: " in listed["records"]["3"] and "ratio" in listed["records"]["5"]
    Image.new("RGB", (112, 112)).save(narrow)  # mended meanwhile: still left out
    SCRIPTS[script].main([*arguments, "--steps", "2", "--resume"])
    assert f"{len(text) - 2} records from" in capsys.readouterr().out


@both
def test_a_tracker_gets_every_row_and_one_that_is_missing_is_named(
    lab, no_plots, monkeypatch, script
):
    reported = []
    monkeypatch.setitem(
        sys.modules,
        "wandb",
        SimpleNamespace(
            init=lambda **_: SimpleNamespace(
                log=lambda values, step: reported.append((step, values))
            )
        ),
    )
    rows = lab.run(script, "--tracker wandb").rows
    assert [step for step, _ in reported] == [1, 2] and reported[0][1]["loss"] == rows[0][
        "loss"
    ]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        lab.run(script, "--tracker wandb --seed 0")


def test_a_reward_of_ones_own(lab, no_plots, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def brevity(response, record):\n"
        "    names = {'chain', 'answer', 'question', 'image', 'length', 'choices'}\n"
        "    assert names <= record.keys()\n"
        "    return -response.length / 100\n"
    )
    name = f"{tmp_path}/mine.py:brevity"
    row = lab.run("grpo", f"--steps 1 --rewards deg {name} --reward-weights 1 0.2").rows[0]
    assert row[f"reward/{name}"] == pytest.approx(-row["length"] / 100)
    assert row["reward"] == pytest.approx(row["reward/deg"] - 0.2 * row["length"] / 100)


# ---------------------------------------------------------------- what cannot work is said first


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("grpo", "--rewards deg lenght", "--rewards: .*no reward 'lenght'"),
        ("grpo", "--reward-weights 1", "--reward-weights"),
        ("grpo", "--rewards nowhere.py:f", "--rewards: .*nowhere.py"),
        ("grpo", "--data nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_errors_before_the_first_step(lab, no_plots, script, flags, message):
    with pytest.raises(SystemExit, match=message):
        lab.run(script, flags)


@pytest.mark.parametrize(
    "flags",
    "--group-size 1, --mu 0, --micro-batch 0, --max-new-tokens 0, --prompts 0, --seed -1, "
    "--clip -0.1, --beta -1, --save-every -1, --temperature 0, --reward-weights nan 1, "
    "--lr inf".split(", "),
)
def test_numbers_that_cannot_be_are_said_in_one_line(flags, capsys):
    option, value, *_ = flags.split()
    with pytest.raises(SystemExit) as error:
        train_grpo.main(flags.split())
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    assert (
        f"{option} {float(value):g}" in said.replace(".0:", ":") and "give at least" in said
    )


# ---------------------------------------------------------------- stopping and going on

LONGER = "--steps 4 --save-every 2"

KILLED_AFTER_STEP_3 = """
import importlib, json, os, signal, sys
from rr1 import run_folder
log = run_folder.RunFolder.log
def log_and_die(run, step, *rest):
    log(run, step, *rest)
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
run_folder.RunFolder.log = log_and_die
for name, arguments in json.loads(sys.argv[1]).items():
    script = importlib.import_module(f"train_{name}")
    child = os.fork()  # nothing has been computed so far; importing torch once is enough
    if not child:
        script.main(arguments)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(lab) -> dict[str, Run]:
    """A run of each script, in a process of its own that got SIGKILL after step 3 was logged and
    before it was saved."""
    runs = {script: Run(lab.folder / f"killed-{script}") for script in SCRIPTS}
    arguments = {
        script: lab.arguments(script, LONGER, run.out) for script, run in runs.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AFTER_STEP_3, json.dumps(arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert [line for line in done.stdout.splitlines() if line.split()[0] in SCRIPTS] == [
        "sft -9",
        "grpo -9",
    ], done.stderr[-3000:]
    return runs


def assert_same_end(run: Run, whole: Run):
    assert equal(run, whole) and run.rows == whole.rows
    if (whole.out / "rollouts.jsonl").exists():
        assert (run.out / "rollouts.jsonl").read_text() == (
            whole.out / "rollouts.jsonl"
        ).read_text()


@both
def test_processes_that_read_ahead_change_nothing(lab, no_plots, script):
    assert_same_end(lab.run(script, LONGER + " --workers 2"), lab.run(script, LONGER))


@both
def test_a_run_goes_on_with_less_memory(lab, killed, no_plots, script):
    """What docs/learn/questions.md advises where memory ran out; the same run but for rounding."""
    whole, run = lab.run(script, LONGER), Run(lab.new_folder())
    shutil.copytree(killed[script].out, run.out)
    arguments = lab.arguments(script, LONGER, run.out)
    less = ["--micro-batch", "1", "--gradient-checkpointing", "--resume"]
    SCRIPTS[script].main([*arguments, *less])
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm"):
        assert run.rows[2][name] == pytest.approx(whole.rows[2][name], rel=1e-3, abs=1e-6)


@both
def test_a_killed_run_goes_on_bit_for_bit(lab, killed, no_plots, script):
    whole, run = lab.run(script, LONGER), killed[script]
    arguments = lab.arguments(script, LONGER, run.out)
    assert (
        len(run.rows) == 3
        and run.checkpoints == ["step-000002"]
        and not (run.out / "model").exists()
    )
    with pytest.raises(SystemExit, match="--resume"):
        SCRIPTS[script].main(arguments)
    SCRIPTS[script].main([*arguments, "--resume"])
    assert_same_end(run, whole)


@both
def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(
    lab, no_plots, monkeypatch, capfd, script
):
    whole, run, log = (
        lab.run(script, LONGER),
        Run(lab.new_folder()),
        run_folder.RunFolder.log,
    )
    arguments = lab.arguments(script, LONGER, run.out)

    def log_and_press(self, step, *rest):
        log(self, step, *rest)
        if step == 1:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(run_folder.RunFolder, "log", log_and_press)
        SCRIPTS[script].main(arguments)
    assert exit.value.code == 130 and signal.getsignal(signal.SIGINT) is handler
    assert "with --resume goes on" in capfd.readouterr().out
    assert run.checkpoints == ["step-000001"] and [row["step"] for row in run.rows] == [1]
    SCRIPTS[script].main([*arguments, "--resume"])
    assert_same_end(run, whole)


# ---------------------------------------------------------------- nothing done is lost


@both
def test_data_that_stop_a_start_do_not_occupy_the_folder(lab, no_plots, script, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    run = Run(lab.new_folder())
    arguments = lab.arguments(script, "", run.out)
    with pytest.raises(records.DataError, match=r"bad\.jsonl:1: not JSON"):
        SCRIPTS[script].main([*arguments, "--data", str(tmp_path / "bad.jsonl")])
    SCRIPTS[script].main(arguments)
    assert equal(run, lab.run(script))


@both
def test_an_error_saves_the_steps_before_it(lab, no_plots, monkeypatch, capsys, script):
    """A reward that raises; a picture that is gone."""
    whole, run = lab.run(script, LONGER), Run(lab.new_folder())
    arguments = lab.arguments(script, LONGER + " --save-every 4", run.out)
    name, calls = {"sft": ("encode", 1), "grpo": ("load_batch", 1)}[script][0], []
    original = getattr(data, name)

    def fail(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise OSError("the disk is gone")
        return original(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(data, name, fail)
        SCRIPTS[script].main(arguments)
    assert run.checkpoints == ["step-000003"]
    assert "OSError in step 4: --resume goes on from step-000003" in capsys.readouterr().out
    SCRIPTS[script].main([*arguments, "--resume"])
    assert_same_end(run, whole)


@both
def test_a_gradient_that_is_not_finite_is_skipped_and_three_end_the_run(
    lab, no_plots, monkeypatch, script
):
    broken = {"sft": (train_sft, "sft_loss"), "grpo": (grpo, "policy_loss")}[script]
    loss_of, calls, bad = getattr(*broken), [], {2}

    def break_loss(*args, **options):
        calls.append(1)
        found = loss_of(*args, **options)
        if len(calls) not in bad:
            return found
        return found * math.nan if script == "sft" else (found[0] * math.nan, found[1])

    monkeypatch.setattr(*broken, break_loss)
    run = Run(lab.new_folder())
    SCRIPTS[script].main(lab.arguments(script, "--steps 3", run.out))
    assert [row["skipped"] for row in run.rows] == [0, 1, 0]
    assert run.rows[1]["grad_norm"] is None and run.rows[2]["grad_norm"] > 0
    assert all(tensor.isfinite().all() for tensor in run.weights.values())

    calls.clear()
    bad.update({2, 3, 4})
    run = Run(lab.new_folder())
    with pytest.raises(SystemExit, match="gradients of the last 3 steps were not finite"):
        SCRIPTS[script].main(lab.arguments(script, "--steps 9", run.out))
    assert run.checkpoints == ["step-000004"] and len(run.rows) == 4


# ---------------------------------------------------------------- held-out records

WATCH = "--eval-every 2 --eval-records 7 --steps 3"


def watched(lab, script: str, flags: str = "") -> Run:
    return lab.run(script, f"{WATCH} --eval-data {lab.world}/test.jsonl {flags}")


@both
def test_held_out_answers_are_greedy_and_judged_by_the_rewards(lab, no_plots, script):
    """The last look at the model that was written, one record at a time by the library."""
    run = watched(lab, script)
    looks = [row for row in run.rows if "eval/accuracy" in row]
    assert [row["step"] for row in looks] == [0, 2, 3]
    model, processor = vlm.load(str(run.out / "model"))
    found = records.read(lab.world / "test.jsonl")[:7]
    r_len, answers, pairs, named = [], [], 0, 0
    for record in found:
        batch = data.load_batch([record], processor)
        ids = torch.tensor(batch.ids)
        written = model.generate(
            input_ids=ids,
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.grid_thw,
            mm_token_type_ids=(ids == processor.image_token_id).int(),
            do_sample=False,
            max_new_tokens=12 if script == "grpo" else 128,
            suppress_tokens=processor.banned_ids,
            eos_token_id=processor.end_id,
        )[0, len(batch.ids[0]) :].tolist()
        truncated = written[-1] != processor.end_id
        length = len(written) - (not truncated)
        y = rewards.Response(processor.decode(written), length, truncated)
        r_len.append(rewards.r_len(length, data.true_length(record, processor)))
        pairs += rewards.match_types(y.chain.degradations, record["degradations"])[0]
        named += len(y.chain.degradations) + len(record["degradations"])
        if record["answer"] is not None:
            answers.append(rewards.accuracy(y, record))
    assert looks[-1]["eval/reward/len"] == pytest.approx(sum(r_len) / 7, abs=1e-9)
    assert looks[-1]["eval/f1"] == pytest.approx(2 * pairs / named)
    assert looks[-1]["eval/accuracy"] == sum(answers) / len(answers)
    if script == "sft":  # two steps of GRPO need not change a greedy answer
        assert looks[0]["eval/reward/len"] != looks[-1]["eval/reward/len"]


def test_a_run_killed_before_its_first_checkpoint_looks_once(lab, no_plots):
    first = watched(lab, "sft")
    run = Run(lab.new_folder())
    shutil.copytree(first.out, run.out)
    shutil.rmtree(run.out / "checkpoints")
    flags = f"{WATCH} --eval-data {lab.world}/test.jsonl --resume"
    SCRIPTS["sft"].main(lab.arguments("sft", flags, run.out))
    assert [row["step"] for row in run.rows] == [0, 1, 2, 3]


def test_a_reward_that_fails_on_a_held_out_record_is_named():
    record = {"id": "7", "degradations": [], "answer": None, "length": None}
    with pytest.raises(RuntimeError, match="reward 'len' on record '7'"):
        training.judge(
            runtime.Means(), rewards.Response("", 0), record, rewards.load_rewards(["len"])
        )


def test_right_answers_are_counted_by_the_total_intensity(processor):
    """none, below .75, below 1.5, and above; types by F1 over all records."""
    means = runtime.Means()
    cases = [
        ([], "yes", 1.0),
        ([0.3], "yes", 1.0),
        ([0.7, 0.1], "no", 0.0),
        ([1.0, 0.6], "yes", 1.0),
    ]
    for intensities, answer, _ in cases:
        true = [Degradation(t, s) for t, s in zip(("noise", "rain"), intensities)]
        y = rewards.Response(
            f"<TYPE>noise(0.30)<TYPE_END>\n<ANSWER>{answer}<ANSWER_END>", 9
        )
        record = {"degradations": true, "answer": "yes", "choices": None, "length": 9}
        training.judge(means, y, record, rewards.load_rewards(["len"]))
    found = means.over_ranks(runtime.Runtime())
    levels = {level: right for level, (_, _, right) in zip(records.LEVELS, cases)}
    assert {level: found[f"accuracy/{level}"] for level in levels} == levels
    assert found["accuracy"] == 0.75 and found["reward/len"] == 1.0
    assert found["f1"] == 2 * 3 / (4 + 5)


@both
def test_looking_changes_nothing_that_is_learnt(lab, no_plots, script):
    assert equal(watched(lab, script), lab.run(script, "--steps 3"))


def test_a_plain_model_is_watched_too(lab, no_plots):
    row = watched(lab, "sft", "--plain").rows[-1]
    assert {"eval/accuracy", "eval/accuracy/strong"} <= row.keys() and "eval/f1" not in row


# ---------------------------------------------------------------- several processes


def collectives(run: Run) -> dict[str, int]:
    """Of a run of two processes that ended with the same weights."""
    ended = [
        json.loads((run.out / f"rank-{rank}-ended.json").read_text()) for rank in (0, 1)
    ]
    assert ended[0] == ended[1], "the ranks' weights or their numbers of collectives differ"
    return ended[0]["calls"]


def command(jobs: list, *options: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    return [*launcher, "tests/two_ranks.py", json.dumps(jobs)]


PLACE = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True}


def test_two_processes_do_what_one_does(lab, no_plots):
    """gloo; the same weights on both ranks, those of one process on the joint batch, as many
    collectives for other data, and the same look at held-out records."""
    watch = f"{WATCH} --eval-data {lab.world}/test.jsonl"
    jobs = [
        ("sft", ""),
        ("grpo", "--prompts 4 --micro-batch 1"),
        ("grpo", "--prompts 4 --micro-batch 1 --seed 1 --max-new-tokens 5"),
        ("grpo", f"{watch} --prompts 4 --loss dapo --mask-truncated"),
        ("sft", f"{watch} --eval-records 1"),
    ]
    runs = [Run(lab.new_folder().with_name(f"two{i}")) for i in range(len(jobs))]
    arguments = [
        (f"train_{script}", lab.arguments(script, flags, run.out))
        for (script, flags), run in zip(jobs, runs)
    ]
    done = subprocess.run(
        command(arguments, "--standalone", "--nproc-per-node", "2"),
        capture_output=True,
        timeout=300,
        **PLACE,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "had read differed" not in done.stdout
    for (script, flags), run in zip(jobs, runs):
        close(lab, lab.run(script, flags), run)
    calls = [collectives(run) for run in runs]
    assert calls[1] == calls[2] and calls[0]["all_reduce"] > 0


def test_where_one_process_fails_the_first_one_saves(lab, no_plots):
    """The other's picture is gone in step 3; what two processes had done one process finishes."""
    flags, run = "--prompts 4 --steps 4", Run(lab.new_folder())
    arguments = lab.arguments("grpo", flags, run.out)
    done = subprocess.run(
        command([("train_grpo", arguments)], "--standalone", "--nproc-per-node", "2"),
        capture_output=True,
        timeout=300,
        **PLACE | {"env": PLACE["env"] | {"FAIL": "1"}},
    )
    assert done.returncode != 0 and "the disk is gone" in done.stderr
    assert "in step 3: --resume goes on from step-000002" in done.stdout
    assert run.checkpoints == ["step-000002"]
    train_grpo.main([*arguments, "--resume"])
    close(lab, lab.run("grpo", flags), run)


def test_two_nodes_do_what_one_process_does(lab, no_plots):
    """Two launchers that meet at an address, one process each. The second one reads other weights
    than the first, as from a folder that changed in between: it is told so, and learns with the
    first one's."""
    jobs = [("grpo", "--prompts 4 --micro-batch 1"), ("sft", "")]
    runs = [Run(lab.new_folder().with_name(f"node{i}")) for i in range(len(jobs))]
    arguments = [
        (f"train_{script}", lab.arguments(script, flags, run.out))
        for (script, flags), run in zip(jobs, runs)
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-id",
        "two",
        "--rdzv-backend",
        "c10d",
    ]
    nodes = []
    for node in (0, 1):
        options = [*meet, "--rdzv-endpoint", f"127.0.0.1:{port}", "--node-rank", str(node)]
        environment = PLACE["env"] | {"OTHER_WEIGHTS": "1"}
        nodes.append(
            subprocess.Popen(
                command(arguments, *options, "--local-addr", "127.0.0.1"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                **PLACE | {"env": environment},
            )
        )
    said = [process.communicate(timeout=300)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], "".join(said)[-4000:]
    told = (
        "the weights that 1 process(es) had read differed: all go on with those of rank 0"
    )
    assert "".join(said).count(told) == 2
    for (script, flags), run in zip(jobs, runs):
        collectives(run)
        close(lab, lab.run(script, flags), run)
