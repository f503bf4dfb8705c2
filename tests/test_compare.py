"""Runs over one another: which are one setting, their curves, what is missing is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from rr1 import rewards
from rr1.evaluation import compare

ROOT = Path(__file__).resolve().parent.parent


def write_run(folder: Path, steps=40, level=0.0, **config) -> Path:
    folder.mkdir(parents=True)
    config = {
        "lr": 1e-4,
        "rewards": ["deg", "len"],
        "seed": 0,
        "out": str(folder),
        "steps": steps,
        "resume": False,
    } | config
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(config["seed"])
    rows = [
        {
            "step": t,
            "reward": level + t / 40 + rng.normal(0, 0.1),
            "reward/deg": 0.5,
            "eval/f1": t / 40 if t % 10 == 0 else None,
            "kl": None if t == 1 else t / 1000,
            "lr": 1e-4,
        }
        for t in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / f"{name}-{seed}", seed=seed, **more)
        for name, more in {
            "paper": {},
            "brief": {"rewards": ["deg", "len", "my.py:brief"], "level": 1.0},
        }.items()
        for seed in (0, 1, 2)
    ]


def test_runs_that_differ_in_the_seed_alone_are_one_setting(runs, tmp_path):
    groups = compare.by_setting(runs)
    assert {label: [run.name for run in group] for label, group in groups.items()} == {
        "rewards deg len": ["paper-0", "paper-1", "paper-2"],
        "rewards deg len my.py:brief": ["brief-0", "brief-1", "brief-2"],
    }
    assert list(compare.by_setting(runs[:3])) == ["all runs"] and list(
        compare.by_setting(runs[:1])
    ) == ["paper-0"]
    other = write_run(tmp_path / "other", lr=5e-5)
    assert list(compare.by_setting([runs[0], runs[3], other])) == [
        "lr 0.0001, rewards deg len",
        "lr 0.0001, rewards deg len my.py:brief",
        "lr 5e-05, rewards deg len",
    ]


def test_three_seeds_are_a_band_with_raw_points_around_it(runs, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, path, **options: (kept.append(self), Path(path).write_bytes(b"png")),
    )
    compare.main([*map(str, runs), "--out", str(tmp_path / "out")])
    axes = {axis.get_title(): axis for axis in kept[0].axes}
    assert set(axes) == {
        "reward of the run itself",
        "reward/deg",
        "eval/f1",
        "KL to the reference (nats a token)",
    }
    reward = axes["reward of the run itself"]
    assert (
        len(reward.collections) == 2
        and len([line for line in reward.lines if line.get_marker() == "."]) == 6
    )
    smoothed = [line for line in reward.lines if line.get_marker() != "."]
    assert [line.get_label() for line in smoothed] == [
        "rewards deg len (3 seeds)",
        "rewards deg len my.py:brief (3 seeds)",
    ]
    low, high = (line.get_ydata() for line in smoothed)
    assert np.allclose(high - low, 1.0, atol=1e-6) and high[-1] - high[0] > 0.8
    band = reward.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() < low.min() < low.max() < band.max()
    assert (
        len(axes["KL to the reference (nats a token)"].lines[0].get_xdata()) == 39
    )  # a step without a number has no point


def test_what_is_missing_is_named(runs, tmp_path):
    with pytest.raises(SystemExit, match="nowhere is not a run's folder with config.json"):
        compare.main([str(tmp_path / "nowhere")])
    (runs[0] / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match="holds no step yet"):
        compare.main([str(runs[0])])


def test_the_picture_is_a_picture(runs, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "rr1.evaluation.compare",
            *map(str, runs),
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and "curves.png" in done.stdout, done.stderr
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG" and not list(
        (tmp_path / "out").glob("*.tmp")
    )


@pytest.mark.parametrize(
    "name, better, worse",
    [("brevity.py:brevity", "short", "long"), ("dark.py:dark", "noticed", "missed")],
)
def test_the_examples(tmp_path, name, better, worse):
    from PIL import Image

    Image.new("RGB", (28, 28), (20, 20, 20)).save(tmp_path / "dark.png")
    text = {
        "short": ("", 5),
        "long": ("", 120),
        "noticed": ("<TYPE>darkness(0.50)<TYPE_END>", 5),
        "missed": ("<TYPE>noise(0.50)<TYPE_END>", 5),
    }
    path = f"{ROOT}/examples/{name}"
    paid = {
        what: rewards.load_rewards([path])[path](
            rewards.Response(*text[what]), {"image": str(tmp_path / "dark.png")}
        )
        for what in (better, worse)
    }
    assert paid[better] > paid[worse]
    assert len((ROOT / "examples" / name.split(":")[0]).read_text().splitlines()) < 20
