"""The restorer, its pairs, the data set that it writes, and how it is trained."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage
import torch
from test_train import KILLED_AFTER_STEP_3, PLACE, ROOT, Run, command, equal

import train_recover
from degrade import degrade
from rr1 import run_folder, tiny
from rr1.data import seed_for
from rr1.records import DataError
from rr1.runtime import Runtime, build_optimizer
from rr1.tiny import world
from rr1.u1 import __main__ as data_set
from rr1.u1 import flow, pairs, report, restorer, rewards

SMALL = {
    "sft": "--steps 2 --batch 4 --side 16 --lr 1e-3 --warmup 1",
    "grpo": "--stage grpo --steps 2 --batch 2 --group-size 4 --sampling-steps 3 "
    "--lr 1e-4 --warmup 1",
}
both = pytest.mark.parametrize("stage", SMALL)


@torch.no_grad()
def random_restorer(side: int = 16) -> restorer.Restorer:
    torch.manual_seed(0)
    model = restorer.Restorer(widths=(8, 8, 16), side=side)
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape))
    return model


class Lab:
    def __init__(self, folder: Path):
        self.folder, self.done = folder, {}
        random_restorer().save_pretrained(folder / "model")
        (folder / "photos").mkdir()
        for i in range(3):
            cv2.imwrite(
                str(folder / "photos" / f"{i}.png"), world.sample(i, 0).clean[:, :, ::-1]
            )

    def arguments(self, stage: str, flags: str, out: Path) -> list[str]:
        return [
            "--model",
            str(self.folder / "model"),
            "--data",
            str(self.folder / "photos"),
            "--out",
            str(out),
            *SMALL[stage].split(),
            *flags.split(),
        ]

    def new_folder(self) -> Path:
        return self.folder / f"run{len(list(self.folder.iterdir()))}"

    def run(self, stage: str, flags: str = "") -> Run:
        if (stage, flags) not in self.done:
            out = self.new_folder()
            train_recover.main(self.arguments(stage, flags, out))
            self.done[stage, flags] = Run(out)
        return self.done[stage, flags]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("recover"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: None)


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    """The choice of a sampler at the end of a run takes longer than the small runs here."""
    monkeypatch.setattr(train_recover, "choose_sampler", lambda *_: None)


# ---------------------------------------------------------------- the network


def test_a_new_network_has_the_velocity_of_a_narrow_gaussian_around_the_damaged_picture():
    model, z_c, t = (
        restorer.Restorer(widths=(8, 8, 16)),
        torch.rand(3, 3, 16, 24) * 2 - 1,
        torch.tensor([0.1, 0.5, 1.0]),
    )
    z_t, u = torch.randn(3, 3, 16, 24), t.view(3, 1, 1, 1)
    with torch.no_grad():
        v = model(z_t, z_c, t)
    d = z_t - (1 - u) * z_c
    torch.testing.assert_close(
        v,
        d * (u - (1 - u) * 0.0009) / ((1 - u) ** 2 * 0.0009 + u**2) - z_c,
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        (z_t - v)[2], z_c[2], rtol=1e-4, atol=1e-5
    )  # at t = 1 the mean is z_1 - v


def test_the_shipped_size():
    assert sum(p.numel() for p in restorer.Restorer().parameters()) < 1_000_000


def test_saved_and_loaded_it_is_the_same_and_a_wrong_folder_is_named(tmp_path):
    model = random_restorer()
    model.save_pretrained(tmp_path / "r")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again, z, t = (
        restorer.Restorer.from_pretrained(tmp_path / "r"),
        torch.randn(2, 3, 16, 16),
        torch.rand(2),
    )
    with torch.no_grad():
        assert torch.equal(model(z, -z, t), again(z, -z, t))
    assert again.config == model.config
    with pytest.raises(SystemExit, match="nothing: not a restorer's folder"):
        restorer.Restorer.from_pretrained(tmp_path / "nothing")


def test_a_picture_is_recovered_alike_in_any_batch():
    model, pictures = random_restorer(), torch.rand(5, 3, 16, 16)
    whole = restorer.recover(model, pictures, [3, 1, 4, 1, 5], steps=3)
    assert whole.shape == pictures.shape
    part = restorer.recover(model, pictures[3:], [1, 5], steps=3, batch=1)
    torch.testing.assert_close(part, whole[3:], rtol=1e-4, atol=1e-5)
    other = restorer.recover(model, pictures[:1], [9], steps=3)
    assert not torch.allclose(other, whole[:1], atol=1e-3)


def test_a_recovery_is_the_mean_of_several_from_noise_of_their_own():
    """Each by Euler steps from numbers of the picture's own stream, in order."""
    model, damaged = random_restorer(), torch.rand(1, 3, 16, 16)
    z_c, grid = 2 * damaged - 1, flow.time_grid(3, restorer.SHIFT)
    starts = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ends = [
            flow.euler(lambda z, t: model(z, z_c, t), z_1[None], grid) for z_1 in starts
        ]
    first = restorer.recover(model, damaged, [7], steps=3, recoveries=1)
    both = restorer.recover(model, damaged, [7], steps=3, recoveries=2)
    torch.testing.assert_close(first, (ends[0] + 1) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both, (ends[0] + ends[1] + 2) / 4, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, both, atol=1e-3)


def test_a_gate_leaves_pictures_that_would_hardly_change():
    model, damaged = random_restorer(), torch.rand(6, 3, 16, 16)
    recovered = restorer.recover(model, damaged, gate=0.0)
    change = restorer.distance(recovered, damaged)
    assert (change > 0.1).all()
    gate = float(change.sort().values[2:4].mean())  # between the third and the fourth
    gated = restorer.recover(model, damaged, gate=gate)
    for i in range(6):
        assert torch.equal(gated[i], damaged[i] if change[i] < gate else recovered[i])


def test_the_sampler_that_earns_most_on_training_pairs_becomes_the_models_own(monkeypatch):
    """The clean picture is grey; recoveries of two steps are grey, and others far from it. Every
    second damaged picture is nearly grey, nearer to it than the recovery is."""
    grey = np.full((16, 16, 3), 128, np.uint8)

    class Source:
        def __len__(self):
            return 8

        def pair(self, index, seed):
            rng = np.random.default_rng(index)
            spread = 2 if index % 2 else 120
            noise = rng.integers(-spread, spread, grey.shape)
            return (grey + noise).astype(np.uint8), grey

    def recover(model, damaged, steps, gate):
        wrong = 0.05 if steps == 2 else 0.2
        return torch.full_like(damaged, 0.5) + wrong * torch.randn(damaged.shape)

    monkeypatch.setattr(report, "recover", recover)
    torch.manual_seed(0)
    model = random_restorer()
    report.choose_sampler(model, Source(), lambda x: x.flatten(1), n=8)
    assert model.config["steps"] == 2 and 0.05 < model.config["gate"] < 0.4


# ---------------------------------------------------------------- pairs


def test_drawn_pairs_are_the_worlds_scenes_damaged_at_their_own_size():
    source = pairs.Scenes(56, seed=1)
    damaged, clean = source.pair(5)
    whole, degradations, record = world.undamaged(5, 1)
    assert np.array_equal(clean, cv2.resize(whole, (56, 56), interpolation=cv2.INTER_AREA))
    assert np.array_equal(whole, world.sample(5, 1).clean)
    assert np.array_equal(damaged, degrade(clean, degradations, seed=5))
    assert not np.array_equal(damaged, clean)
    assert [d._asdict() for d in degradations] == record["degradations"] != []
    tensor, _ = pairs.load_pairs(source, [5], [0])
    assert tensor.shape == (1, 3, 56, 56)
    assert np.array_equal(restorer.to_uint8(tensor)[0], damaged)


def test_kept_pairs_are_drawn_once_and_those_of_another_version_again(
    tmp_path, monkeypatch, capfd
):
    drawn = pairs.Scenes(16, n=20)
    kept = pairs.Scenes(16, n=20).kept(tmp_path)
    assert len(kept) == 20
    for i in range(20):
        assert np.array_equal(drawn.pair(i), kept.pair(i))
    [path] = tmp_path.iterdir()
    assert path.name.startswith("pairs-16-20-") and "drawing" in capfd.readouterr().err
    again = pairs.Scenes(16, n=20).kept(tmp_path)
    assert (
        np.array_equal(again.drawn, kept.drawn) and "drawing" not in capfd.readouterr().err
    )
    pairs.Scenes(16, seed=2, n=20).kept(tmp_path)
    assert "drawing" in capfd.readouterr().err and len(list(tmp_path.iterdir())) == 2


def test_crops_of_photos_follow_from_the_seed_and_are_damaged(lab, tmp_path):
    source = pairs.load_source(str(lab.folder / "photos"), 32)
    crops = [source.pair(0, seed) for seed in range(8)]
    assert len(source) == 3 and all(p.shape == (32, 32, 3) for crop in crops for p in crop)
    assert all(np.array_equal(a, b) for a, b in zip(source.pair(0, 3), crops[3]))
    assert len({clean.tobytes() for _, clean in crops}) == 8 and any(
        (damaged != clean).any() for damaged, clean in crops
    )
    with pytest.raises(
        DataError, match=r"0.png: 112 x 112 pixels, smaller than --side 256"
    ):
        pairs.load_source(str(lab.folder / "photos"), 256)
    with pytest.raises(SystemExit, match="no photos"):
        pairs.load_source(str(lab.folder / "model"), 32)


def test_measures_of_equal_pictures():
    _, clean = pairs.load_pairs(pairs.Scenes(56, seed=1), range(3), range(3))
    found = report.measure(clean, clean, lambda x: x.flatten(1))
    assert {name: values.shape for name, values in found.items()} == {
        name: (3,) for name in ("psnr", "ssim", "r_sem")
    }
    assert (
        found["psnr"].tolist() == [100] * 3
        and found["ssim"].tolist() == [1] * 3
        and found["r_sem"] == pytest.approx([1] * 3, abs=1e-4)
    )


# ---------------------------------------------------------------- the data set, and the report


def test_a_data_set_with_recovered_pictures(
    lab, world_folder, tmp_path, monkeypatch, capsys
):
    out, rows = (
        tmp_path / "out",
        [
            json.loads(line)
            for line in (world_folder / "test.jsonl").read_text().splitlines()
        ],
    )
    arguments = [
        "--model",
        str(lab.folder / "model"),
        "--data",
        str(world_folder / "test.jsonl"),
        "--steps",
        "2",
        "--batch",
        "5",
        "--out",
        str(out),
    ]
    recover, calls = pairs.recover, []

    def cut_off(*args):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return recover(*args)

    with monkeypatch.context() as patch:  # cut off after the first batch
        patch.setattr(pairs, "recover", cut_off)
        with pytest.raises(KeyboardInterrupt):
            data_set.main(arguments)
    first = {p.name: p.stat().st_mtime_ns for p in (out / "test" / "recovered").iterdir()}
    assert len(first) == 5 and not (out / "test.jsonl").exists()
    data_set.main(arguments)
    assert all(
        (out / "test" / "recovered" / name).stat().st_mtime_ns == when
        for name, when in first.items()
    )
    written = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    assert len(written) == len(rows)
    for before, after in zip(rows, written):
        damaged, recovered = (cv2.imread(str(out / path)) for path in after["image"])
        assert (
            np.array_equal(damaged, cv2.imread(str(world_folder / before["image"])))
            and recovered.shape == damaged.shape
        )
        assert np.array_equal(
            cv2.imread(str(out / after["clean_image"])),
            cv2.imread(str(world_folder / before["clean_image"])),
        )
        assert (
            after["conversations"][0]["value"]
            == "<image>" + before["conversations"][0]["value"]
        )
        assert {
            k: v
            for k, v in after.items()
            if k not in ("image", "clean_image", "conversations")
        } == {
            k: v
            for k, v in before.items()
            if k not in ("image", "clean_image", "conversations")
        }
        assert after["conversations"][1] == before["conversations"][1]
    whole = tmp_path / "whole"
    data_set.main([*arguments[:-1], str(whole)])
    for path in sorted((whole / "test" / "recovered").iterdir()):
        a, b = (
            cv2.imread(str(p)).astype(int)
            for p in (path, out / "test" / "recovered" / path.name)
        )
        assert np.abs(a - b).max() <= 1, "a resumed run recovers what a whole one does"
    with pytest.raises(SystemExit, match="other settings"):
        data_set.main([*arguments, "--seed", "1"])


def test_a_report_says_how_near_recoveries_come(lab, tmp_path, capsys):
    """Crops of scikit-image's photos: the table is that of `measure`, the strip has three rows."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("astronaut.png", "chelsea.png", "coffee.png"):
        shutil.copy(Path(skimage.__file__).parent / "data" / name, photos)
    folder = lab.folder / "model"
    ask = f"--restorer {folder} --data {photos} --limit 5 --steps 2 --out {out}"
    report.main(ask.split())
    damaged, clean = pairs.held_out(pairs.load_source(str(photos), 16), 5)
    model = restorer.Restorer.from_pretrained(folder).eval()
    seeds = [seed_for(0, i) for i in range(5)]
    recovered = restorer.recover(model, damaged, seeds, steps=2)
    found = report_rows(out)
    for name, shown in (("damaged", damaged), ("recovered", recovered)):
        psnr = rewards.psnr(shown, clean).mean().item()
        assert found[name][0].startswith(f"{psnr:.3f}")
    gain = rewards.ssim(recovered, clean).mean() - rewards.ssim(damaged, clean).mean()
    assert f"{gain.item():+.3f} [" in found["recovered"][1]
    assert cv2.imread(str(out / "strip.png")).shape == (3 * 64, 5 * 64, 3)
    said = capsys.readouterr().out
    assert (
        said.startswith("5 damaged pictures") and (out / "report.txt").read_text() in said
    )


def report_rows(out: Path) -> dict[str, list[str]]:
    """The first table of a report: name of the row -> its cells."""
    lines = (out / "report.txt").read_text().splitlines()
    rows = [line.strip("| ").split("|") for line in lines if line.startswith("|")][2:4]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def test_a_report_leaves_undamaged_scenes_out(lab, tmp_path):
    """They would count 100 dB each before, and less after."""
    ask = f"--restorer {lab.folder / 'model'} --limit 64 --steps 1 --out {tmp_path}"
    report.main(ask.split())
    damaged, clean = pairs.held_out(pairs.Scenes(16), 64)
    n = int((damaged != clean).flatten(1).any(1).sum())
    said = (tmp_path / "report.txt").read_text()
    assert 40 < n < 64 and said.startswith(f"{n} damaged pictures")
    assert float(report_rows(tmp_path)["damaged"][0].split()[0]) < 40


def test_a_restorers_weights_go_on_at_another_side(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "SCENES", 20)
    monkeypatch.setattr(tiny, "WORLD", tmp_path / "world")
    train_recover.main(
        [
            "--model",
            str(lab.folder / "model"),
            "--side",
            "24",
            "--steps",
            "1",
            "--batch",
            "2",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    model = restorer.Restorer.from_pretrained(tmp_path / "run" / "model")
    assert model.config == restorer.Restorer.from_pretrained(
        lab.folder / "model"
    ).config | {"side": 24}
    assert restorer.recover(model, torch.rand(1, 3, 24, 24)).shape == (1, 3, 24, 24)


def test_the_shipped_restorer():
    """float16 on disk; nearer to the clean scenes than the damaged pictures, in squared error."""
    model = restorer.Restorer.from_pretrained(tiny.RESTORER).eval()
    assert (
        sum(p.stat().st_size for p in Path(tiny.RESTORER).iterdir()) < 4e6
        and model.config["side"] == 32
    )
    damaged, clean = pairs.load_pairs(pairs.Scenes(32, seed=1), range(24), range(24))
    recovered = restorer.recover(model, damaged)
    assert (recovered.clamp(0, 1) - clean).square().mean() < 0.8 * (
        damaged - clean
    ).square().mean()


# ---------------------------------------------------------------- training


@both
def test_files_and_metrics_of_a_run(lab, stage):
    run = lab.run(stage)
    assert {p.name for p in run.out.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "strip.png",
    }
    assert cv2.imread(str(run.out / "strip.png")).shape == (3 * 64, 8 * 64, 3)
    assert [row["step"] for row in run.rows] == [1, 2] and all(
        isinstance(v, (int, float)) for row in run.rows for v in row.values()
    )
    assert restorer.Restorer.from_pretrained(run.out / "model").config["side"] == 16
    first = run.rows[0]
    if stage == "grpo":
        assert (
            first["ratio"] == 1
            and first["kl"] == 0
            and abs(first["loss"]) < 1e-6
            and run.rows[1]["kl"] > 0
        )
        assert (
            first["reward"]
            == pytest.approx(first["reward/pix"] + 0.2 * first["reward/sem"], rel=1e-5)
            and first["reward_std"] > 0
        )


CHANGES = {
    "sft": [
        "--seed 1",
        "--lr 2e-3",
        "--warmup 3",
        "--batch 2",
        "--loss eps",
        "--shift 3",
        "--at-noise 0",
    ],
    "grpo": [
        "--group-size 2",
        "--sampling-steps 2",
        "--noise 0.3",
        "--shuffle",
        "--reward-weights 0 1",
        "--beta 5",
        "--mu 2",
        "--mu 2 --clip 1e-9",
    ],
}
ELSEWHERE = {
    "stage",
    "model",
    "data",
    "side",
    "out",
    "steps",
    "encoder",
    "save_every",
    "resume",
    "tracker",
}


@pytest.mark.parametrize(
    "stage, flags", [(stage, flags) for stage in CHANGES for flags in CHANGES[stage]]
)
def test_every_flag_changes_something(lab, stage, flags):
    base = "--mu 2" if "clip" in flags else ""
    assert not equal(lab.run(stage, base), lab.run(stage, flags))


def test_no_flag_is_forgotten_above():
    seen = {
        word[2:].replace("-", "_")
        for rows in CHANGES.values()
        for row in rows
        for word in row.split()
        if word.startswith("--")
    }
    assert seen | ELSEWHERE == {f.name for f in fields(train_recover.Config)}


def apart(lab, a: Run, b: Run) -> float:
    """How far two runs ended from each other, as a share of the way that they went."""
    start = restorer.Restorer.from_pretrained(lab.folder / "model").state_dict()
    way_a, way_b = (
        torch.cat([(run.weights[name] - start[name]).flatten() for name in start])
        for run in (a, b)
    )
    return float((way_a - way_b).norm() / way_b.norm())


def test_a_new_restorer_starts_from_the_seed_and_of_the_given_side(
    lab, tmp_path, monkeypatch
):
    (
        monkeypatch.setattr(pairs, "SCENES", 20),
        monkeypatch.setattr(tiny, "WORLD", tmp_path / "world"),
    )
    runs = [Run(tmp_path / str(i)) for i in range(2)]
    for run in runs:
        train_recover.main(
            ["--out", str(run.out), "--side", "24", "--steps", "1", "--batch", "2"]
        )  # the drawn world
    assert (
        equal(*runs)
        and restorer.Restorer.from_pretrained(runs[0].out / "model").config["side"] == 24
    )
    for flags, message in (("--side 20", "multiple of 8"), ("--side 24", "--resume")):
        with pytest.raises(SystemExit, match=message):
            train_recover.main(
                ["--out", str(runs[0].out), *flags.split(), "--steps", "1", "--batch", "2"]
            )


def test_another_encoder_pays_otherwise(lab, monkeypatch):
    base, asked = lab.run("grpo"), []
    monkeypatch.setattr(
        rewards,
        "load_encoder",
        lambda name, device: asked.append(name) or (lambda x: x.flatten(1)),
    )
    run = lab.run("grpo", "--encoder mine")
    assert (
        asked == ["mine"]
        and run.rows[0]["reward/sem"] != base.rows[0]["reward/sem"]
        and run.rows[0]["reward/pix"] == base.rows[0]["reward/pix"]
    )


# ---------------------------------------------------------------- which way training goes


def options(stage: str, **others) -> train_recover.Config:
    """Of a small step: two pictures, four recoveries of each."""
    config = train_recover.Config(
        stage=stage, steps=10, batch=2, lr=2e-3, warmup=1, group_size=4
    )
    config.sampling_steps = 3
    for name, value in others.items():
        setattr(config, name, value)
    return config


def step_of(
    stage, model, damaged, clean, config=None, step=0, optimizer=None
) -> dict[str, float]:
    """What one step logs; the model is changed."""
    config = config or options(stage)
    optimizer = optimizer or build_optimizer(model, config.lr, weight_decay=0.0)
    given = (config, Runtime(), model, optimizer)
    seeds = [100 + step, 200 + step]
    if stage == "sft":
        return train_recover.fine_tune(*given, step, seeds, damaged, clean)
    reference = copy.deepcopy(model)
    encoder = torch.nn.Flatten()
    return train_recover.reinforce(*given, reference, encoder, step, seeds, damaged, clean)


@both
def test_the_damaged_picture_is_seen(stage):
    """The same noise and clean pictures beside other damaged ones: another loss, another reward."""
    clean, *others = torch.rand(3, 2, 3, 16, 16)
    logged = [step_of(stage, random_restorer(), damaged, clean) for damaged in others]
    name = "loss" if stage == "sft" else "reward"
    assert abs(logged[0][name] - logged[1][name]) > 1e-3


def test_the_reward_is_against_the_clean_picture(monkeypatch):
    damaged, clean, seen = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16), []

    def terms(pictures, target, encoder):
        seen.append(target)
        return {"pix": pictures.mean((1, 2, 3)), "sem": pictures.mean((1, 2, 3))}

    monkeypatch.setattr(rewards, "terms", terms)
    step_of("grpo", random_restorer(), damaged, clean)
    assert torch.equal(seen[0], clean.repeat_interleave(4, 0))


class Offset(torch.nn.Module):
    """The exact velocity for clean pictures N(z_c + b, 0.3^2), of which b is to be learnt."""

    def __init__(self):
        super().__init__()
        self.b = torch.nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, z_t, z_c, t):
        t, m = t.view(-1, 1, 1, 1), z_c + self.b
        variance = (1 - t) ** 2 * 0.3**2 + t**2
        return (z_t - (1 - t) * m) * (t - (1 - t) * 0.3**2) / variance - m


def test_reinforcement_goes_where_the_reward_is(monkeypatch):
    """Bright pictures are paid for: recoveries become brighter in every colour. Shuffled
    advantages, the control, take them nowhere near as far."""

    def terms(pictures, target, encoder):
        brightness = pictures.mean((1, 2, 3))
        return {"pix": brightness, "sem": torch.zeros_like(brightness)}

    monkeypatch.setattr(rewards, "terms", terms)
    damaged = clean = torch.full((2, 3, 16, 16), 0.5)

    def learnt(**control) -> torch.Tensor:
        model = Offset()
        config = options("grpo", beta=0.0, clip=1.0, group_size=16, lr=0.02, **control)
        optimizer = build_optimizer(model, config.lr, weight_decay=0.0)
        for step in range(10):
            step_of("grpo", model, damaged, clean, config, step, optimizer)
        return model.b.detach()

    offset, of_control = learnt(), learnt(shuffle=True)
    assert (offset > 0.04).all() and of_control.abs().mean() < offset.mean() / 2


@pytest.mark.parametrize(
    "stage, flags, message",
    [
        ("grpo", "--reward-weights 1", "--reward-weights: give two"),
        ("grpo", "--group-size 1", "--group-size 1: give at least 2"),
        ("grpo", "--sampling-steps 1", "--sampling-steps 1: give at least 2"),
        ("grpo", "--noise 0", "--noise 0.0: give at least"),
        ("sft", "--shift 0", "--shift 0.0: give at least"),
        ("sft", "--batch 0", "--batch 0: give at least 1"),
        ("sft", "--side 8", "--side 8: give at least 16"),
        ("sft", "--side 256", "smaller than --side 256"),
        ("sft", "--encoder nowhere", "--encoder nowhere"),
        ("sft", "--data nowhere", "--data nowhere: no photos"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(
    lab, stage, flags, message, capsys
):
    out = lab.folder / "not-begun"
    with pytest.raises((SystemExit, DataError)) as error:
        train_recover.main(lab.arguments(stage, flags, out))
    said = f"{error.value} {capsys.readouterr().err}"
    assert message in said and not out.exists()


# ---------------------------------------------------------------- stopping and going on

LONGER = "--steps 4 --save-every 2"


@pytest.fixture(scope="module")
def killed(lab) -> dict[str, Run]:
    """A run of each stage that got SIGKILL after step 3 was logged and before it was saved."""
    runs = {stage: Run(lab.folder / f"killed-{stage}") for stage in SMALL}
    arguments = {
        stage: lab.arguments(stage, LONGER, run.out) for stage, run in runs.items()
    }
    program = KILLED_AFTER_STEP_3.replace('f"train_{name}"', '"train_recover"')
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "sft -9" in done.stdout and "grpo -9" in done.stdout, done.stderr[-3000:]
    return runs


@both
def test_a_killed_run_goes_on_bit_for_bit(lab, killed, stage):
    run, whole = killed[stage], lab.run(stage, LONGER)
    assert len(run.rows) == 3 and run.checkpoints == ["step-000002"]
    train_recover.main([*lab.arguments(stage, LONGER, run.out), "--resume"])
    assert equal(run, whole) and run.rows == whole.rows


def test_two_processes_do_what_one_does(lab):
    jobs = [("sft", ""), ("grpo", "")]
    runs = [Run(lab.folder / f"two-{stage}") for stage, _ in jobs]
    arguments = [
        ("train_recover", lab.arguments(stage, flags, run.out))
        for (stage, flags), run in zip(jobs, runs)
    ]
    launch = command(arguments, "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(launch, capture_output=True, timeout=300, **PLACE)
    assert done.returncode == 0, done.stderr[-4000:]
    for (stage, flags), run in zip(jobs, runs):
        ended = [
            json.loads((run.out / f"rank-{rank}-ended.json").read_text()) for rank in (0, 1)
        ]
        assert ended[0] == ended[1], (
            "the ranks' weights or their numbers of collectives differ"
        )
        assert apart(lab, run, lab.run(stage, flags)) < 1e-2
        for a, b in zip(lab.run(stage, flags).rows, run.rows, strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
