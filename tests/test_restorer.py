"""The restorer, the pairs it learns from, the data set it writes, and its training script: files, flags, resume, two processes."""
import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import skimage
import torch
from test_train import KILLED_AFTER_STEP_3, ROOT, Run, equal

import evaluate
import train_recover
from degrade import degrade
from rr1 import data, run_folder, tiny
from rr1.u1 import image_rewards, recovery, restorer
from rr1.u1 import pairs as pictures
from rr1.tiny import world

SMALL = {"sft": "--steps 2 --batch 4 --micro-batch 4 --side 16 --lr 1e-3 --warmup 1",
         "grpo": "--stage grpo --steps 2 --batch 2 --group-size 4 --micro-batch 8 --sampling-steps 3 --window 0 --lr 1e-4 --warmup 1"}
both = pytest.mark.parametrize("stage", SMALL)


@torch.no_grad()
def random_restorer(side: int = 16, **options) -> restorer.Restorer:
    torch.manual_seed(0)
    model = restorer.Restorer(widths=(8, 8, 16), side=side, **options)
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape))
    return model


class Lab:
    def __init__(self, folder: Path):
        self.folder, self.done = folder, {}
        random_restorer().save_pretrained(folder / "model")
        (folder / "photos").mkdir()
        for i in range(3):
            cv2.imwrite(str(folder / "photos" / f"{i}.png"), world.sample(i, 0).clean[:, :, ::-1])

    def arguments(self, stage: str, flags: str, out: Path) -> list[str]:
        return ["--model", str(self.folder / "model"), "--data", str(self.folder / "photos"), "--out", str(out), *SMALL[stage].split(), *flags.split()]

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


# ---------------------------------------------------------------- the network

def test_a_new_network_has_the_velocity_of_a_narrow_gaussian_around_the_damaged_picture():
    model, z_c, t = restorer.Restorer(widths=(8, 8, 16)), torch.rand(3, 3, 16, 24) * 2 - 1, torch.tensor([0.1, 0.5, 1.0])
    z_t, u = torch.randn(3, 3, 16, 24), t.view(3, 1, 1, 1)
    with torch.no_grad():
        v = model(z_t, z_c, t)
    d = z_t - (1 - u) * z_c
    torch.testing.assert_close(v, d * (u - (1 - u) * 0.0009) / ((1 - u) ** 2 * 0.0009 + u**2) - z_c, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((z_t - v)[2], z_c[2], rtol=1e-4, atol=1e-5)                      # at t = 1 the mean is z_1 - v


def test_the_shipped_size():
    assert sum(p.numel() for p in restorer.Restorer().parameters()) < 1_000_000


def test_saved_and_loaded_it_is_the_same_and_a_wrong_folder_is_named(tmp_path):
    model = random_restorer()
    model.save_pretrained(tmp_path / "r")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["config.json", "model.safetensors"]
    again, z, t = restorer.Restorer.from_pretrained(tmp_path / "r"), torch.randn(2, 3, 16, 16), torch.rand(2)
    with torch.no_grad():
        assert torch.equal(model(z, -z, t), again(z, -z, t))
    assert again.config == model.config
    with pytest.raises(SystemExit, match="nothing: not a restorer's folder"):
        restorer.Restorer.from_pretrained(tmp_path / "nothing")


def test_a_picture_is_recovered_alike_in_any_batch():
    model, pictures = random_restorer(), torch.rand(5, 3, 16, 16)
    whole = restorer.restore(model, pictures, 3, seeds=[3, 1, 4, 1, 5])
    assert whole.shape == pictures.shape
    torch.testing.assert_close(restorer.restore(model, pictures[3:], 3, seeds=[1, 5], batch=1), whole[3:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(restorer.restore(model, pictures[:1], 3, seeds=[9]), whole[:1], atol=1e-3)


def test_latents_of_an_autoencoder(monkeypatch, tmp_path, no_plots):
    """A stand-in for diffusers, whose latents are the averages of 8 x 8 pixels; without diffusers the message says what to install."""
    class AutoencoderKL(torch.nn.Module):
        config = SimpleNamespace(scaling_factor=0.5, shift_factor=0.1, latent_channels=4, block_out_channels=(8, 8, 8, 8))
        encode = lambda self, x: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.nn.functional.avg_pool2d(x, 8).repeat(1, 2, 1, 1)[:, :4]))
        decode = lambda self, z: SimpleNamespace(sample=torch.nn.functional.interpolate(z[:, :3], scale_factor=8))

        @classmethod
        def from_pretrained(cls, folder, use_safetensors):
            assert use_safetensors
            return cls()

        @classmethod
        def load_config(cls, folder):
            if folder != "folder":
                raise OSError("no such thing")
            return vars(cls.config)

    pictures = torch.rand(2, 3, 64, 64)
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=AutoencoderKL))
    model = restorer.for_pictures(64, "folder")
    encode, decode = restorer.codec(model)
    assert encode(pictures).shape == (2, 4, 8, 8) and model.config["channels"] == 4
    torch.testing.assert_close(encode(pictures)[:, 0], 0.5 * (2 * torch.nn.functional.avg_pool2d(pictures, 8)[:, 0] - 1 - 0.1))
    torch.testing.assert_close(decode(encode(pictures)), torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(pictures, 8), scale_factor=8))
    assert restorer.restore(model, pictures, 2).shape == pictures.shape
    for settings, message in (((32, "folder"), "--side 32: .*6 times, by the autoencoder too; give a multiple of 64"), ((64, "typo"), "typo: not the folder or hub id of an AutoencoderKL"),
                              ((20, ""), "--side 20: .*3 times; give a multiple of 8")):
        with pytest.raises(SystemExit, match=message):
            restorer.for_pictures(*settings)
    cv2.imwrite(str(tmp_path / "photo.png"), np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8))
    train_recover.main(["--data", str(tmp_path), "--side", "64", "--vae", "folder", "--steps", "1", "--batch", "2", "--out", str(tmp_path / "run")])
    assert restorer.Restorer.from_pretrained(tmp_path / "run" / "model").config == model.config
    with pytest.raises(SystemExit, match="--vae: the restorer of --model"):
        train_recover.main(["--model", str(tmp_path / "run" / "model"), "--vae", "folder", "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match="pip install diffusers"):
        restorer.codec(model)


# ---------------------------------------------------------------- pairs

def test_drawn_pairs_are_the_worlds_scenes_damaged_at_their_own_size():
    damaged, clean = tiny.pairs(56, seed=1).pair(5)
    whole, degradations, record = world.undamaged(5, 1)
    assert np.array_equal(clean, cv2.resize(whole, (56, 56), interpolation=cv2.INTER_AREA)) and np.array_equal(whole, world.sample(5, 1).clean)
    assert np.array_equal(damaged, degrade(clean, degradations, seed=5)) and not np.array_equal(damaged, clean)
    assert [d._asdict() for d in degradations] == record["degradations"] != []
    tensor, _ = recovery.load_pairs(tiny.pairs(56, seed=1), [5], [0])
    assert tensor.shape == (1, 3, 56, 56) and np.array_equal(recovery.to_uint8(tensor)[0], damaged)


def test_kept_pairs_are_drawn_once_and_those_of_another_version_again(tmp_path, monkeypatch, capfd):
    drawn, kept = pictures.Pairs(16, n=20), pictures.Pairs(16, n=20).kept(tmp_path)
    assert all(np.array_equal(a, b) for i in range(20) for a, b in zip(drawn.pair(i), kept.pair(i))) and len(kept) == 20
    assert [p.name for p in tmp_path.iterdir()] == ["pairs-16.npy"] and "drawing" in capfd.readouterr().err
    again = pictures.Pairs(16, n=20).kept(tmp_path)
    assert np.array_equal(again.drawn, kept.drawn) and "drawing" not in capfd.readouterr().err
    np.save(tmp_path / "pairs-16.npy", 255 - kept.drawn)
    assert np.array_equal(pictures.Pairs(16, n=20).kept(tmp_path).drawn, kept.drawn) and "drawing" in capfd.readouterr().err
    assert len(pictures.Pairs(16, n=24).kept(tmp_path).drawn) == 24


def test_crops_of_photos_follow_from_the_seed_and_are_damaged(lab, tmp_path):
    source = recovery.load_source(str(lab.folder / "photos"), "", 32)
    pairs = [source.pair(0, seed) for seed in range(8)]
    assert len(source) == 3 and all(p.shape == (32, 32, 3) for pair in pairs for p in pair)
    assert all(np.array_equal(a, b) for a, b in zip(source.pair(0, 3), pairs[3]))
    assert len({clean.tobytes() for _, clean in pairs}) == 8 and any((damaged != clean).any() for damaged, clean in pairs)
    with pytest.raises(data.DataError, match="smaller than --side"):
        recovery.load_source(str(lab.folder / "photos"), "", 256).pair(0, 0)
    with pytest.raises(SystemExit, match="no photos"):
        recovery.load_source(str(lab.folder / "model"), "", 32)


def test_a_file_of_records_needs_clean_images(world_folder):
    assert len(recovery.load_source(str(world_folder / "test.jsonl"), "", 32)) == 16
    with pytest.raises(SystemExit, match="train.jsonl:1: field clean_image is missing"):
        recovery.load_source(str(world_folder / "train.jsonl"), "", 32)


def test_measures_of_equal_pictures():
    clean = recovery.load_pairs(tiny.pairs(56, seed=1), range(3), range(3))[1]
    found = recovery.measure(clean, clean, lambda x: x.flatten(1), batch=2)
    assert {name: values.shape for name, values in found.items()} == {name: (3,) for name in ("psnr", "ssim", "r_sem")}
    assert found["psnr"].tolist() == [100] * 3 and found["ssim"].tolist() == [1] * 3 and found["r_sem"] == pytest.approx([1] * 3, abs=1e-4)


# ---------------------------------------------------------------- the data set with recovered pictures

def test_a_data_set_with_recovered_pictures(lab, world_folder, tmp_path, monkeypatch, capsys):
    out, rows = tmp_path / "out", [json.loads(line) for line in (world_folder / "test.jsonl").read_text().splitlines()]
    arguments = ["--model", str(lab.folder / "model"), "--data", str(world_folder / "test.jsonl"), "--steps", "2", "--batch", "5", "--out", str(out)]
    with monkeypatch.context() as patch:                                            # cut off after the first batch
        patch.setattr(restorer, "restore", lambda *args, done=[], restore=restorer.restore: done.append(1) or len(done) > 1 and 1 / 0 or restore(*args))
        with pytest.raises(ZeroDivisionError):
            restorer.main(arguments)
    first = {p.name: p.stat().st_mtime_ns for p in (out / "test" / "recovered").iterdir()}
    assert len(first) == 5 and not (out / "test.jsonl").exists()
    restorer.main(arguments)
    assert all((out / "test" / "recovered" / name).stat().st_mtime_ns == when for name, when in first.items())
    written = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    assert len(written) == len(rows)
    for before, after in zip(rows, written):
        damaged, recovered = (cv2.imread(str(out / path)) for path in after["image"])
        assert np.array_equal(damaged, cv2.imread(str(world_folder / before["image"]))) and recovered.shape == damaged.shape
        assert np.array_equal(cv2.imread(str(out / after["clean_image"])), cv2.imread(str(world_folder / before["clean_image"])))
        assert after["conversations"][0]["value"] == "<image>" + before["conversations"][0]["value"]
        assert {k: v for k, v in after.items() if k not in ("image", "clean_image", "conversations")} == {
            k: v for k, v in before.items() if k not in ("image", "clean_image", "conversations")}
        assert after["conversations"][1] == before["conversations"][1]
    whole = tmp_path / "whole"
    restorer.main([*arguments[:-1], str(whole)])
    for path in sorted((whole / "test" / "recovered").iterdir()):
        a, b = (cv2.imread(str(p)).astype(int) for p in (path, out / "test" / "recovered" / path.name))
        assert np.abs(a - b).max() <= 1, "a resumed run recovers what a whole one does"
    with pytest.raises(SystemExit, match="other options"):
        restorer.main([*arguments, "--seed", "1"])


def test_evaluate_says_how_near_recoveries_come(lab, tmp_path, capsys, monkeypatch):
    """Crops of scikit-image's photos: the table is that of `measure`, with LPIPS by a stand-in, and the strip has three rows."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("astronaut.png", "chelsea.png", "coffee.png"):
        shutil.copy(Path(skimage.__file__).parent / "data" / name, photos)
    arguments = ["--restorer", str(lab.folder / "model"), "--data", str(photos), "--limit", "5", "--euler-steps", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(SystemExit, match="pip install lpips"):
        evaluate.main([*arguments, "--lpips"])
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda net, verbose: Far()))
    evaluate.main([*arguments, "--lpips"])
    damaged, clean = recovery.held_out(recovery.load_source(str(photos), "", 16), 5)
    recovered = recovery.recover(restorer.Restorer.from_pretrained(lab.folder / "model").eval(), damaged, 2)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["n"] == 5 and list(report["damaged"]) == ["psnr", "ssim", "r_sem", "lpips"]
    for name, shown in (("damaged", damaged), ("recovered", recovered)):
        assert report[name]["psnr"]["value"] == pytest.approx(image_rewards.psnr(shown, clean).mean().item(), abs=1e-4)
        assert report[name]["lpips"]["value"] == pytest.approx((2 * (shown.clamp(0, 1) - clean)).abs().mean().item(), abs=1e-5)
    gain = report["recovered less damaged"]["ssim"]
    assert gain["value"] == pytest.approx(report["recovered"]["ssim"]["value"] - report["damaged"]["ssim"]["value"], abs=1e-6) and gain["low"] <= gain["high"]
    assert cv2.imread(str(tmp_path / "out" / "strip.png")).shape == (3 * 64, 5 * 64, 3)
    said = capsys.readouterr().out
    assert said.startswith("5 damaged pictures") and "LPIPS (less is better)" in said and (tmp_path / "out" / "report.txt").read_text() in said


def test_evaluate_leaves_undamaged_scenes_out(lab, tmp_path):
    """They would count 100 dB each before, and less after."""
    evaluate.main(["--restorer", str(lab.folder / "model"), "--limit", "64", "--euler-steps", "1", "--out", str(tmp_path)])
    damaged, clean = recovery.held_out(tiny.pairs(16), 64)
    n = sum(not torch.equal(a, b) for a, b in zip(damaged, clean))
    report = json.loads((tmp_path / "report.json").read_text())
    assert 40 < n < 64 and report["n"] == n and report["damaged"]["psnr"]["high"] < 99


def test_a_restorers_weights_go_on_at_another_side(lab, tmp_path):
    train_recover.main(["--model", str(lab.folder / "model"), "--side", "24", "--steps", "1", "--batch", "2", "--out", str(tmp_path / "run")])
    model = restorer.Restorer.from_pretrained(tmp_path / "run" / "model")
    assert model.config == restorer.Restorer.from_pretrained(lab.folder / "model").config | {"side": 24}
    assert recovery.recover(model, torch.rand(1, 3, 24, 24), 1).shape == (1, 3, 24, 24)


class Far(torch.nn.Module):
    """A stand-in for LPIPS: the mean difference, in the form and range of the real one."""

    def forward(self, a, b):
        assert a.min() >= -1 and a.max() <= 1
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


def test_the_shipped_restorer():
    """Half of float32's size on disk, and nearer to the clean scenes than the damaged pictures are, in mean squared error."""
    model = restorer.Restorer.from_pretrained(tiny.RESTORER).eval()
    assert sum(p.stat().st_size for p in Path(tiny.RESTORER).iterdir()) < 4e6 and model.config["side"] == 32
    damaged, clean = recovery.load_pairs(tiny.pairs(32, seed=1), range(24), range(24))
    recovered = recovery.recover(model, damaged, 5)
    assert (recovered.clamp(0, 1) - clean).square().mean() < 0.8 * (damaged - clean).square().mean()


# ---------------------------------------------------------------- training

@both
def test_files_and_metrics_of_a_run(lab, stage):
    run = lab.run(stage)
    assert {p.name for p in run.out.iterdir()} >= {"config.json", "metrics.jsonl", "checkpoints", "model", "strip.png"}
    assert cv2.imread(str(run.out / "strip.png")).shape == (3 * 64, 8 * 64, 3)
    assert [row["step"] for row in run.rows] == [1, 2] and all(isinstance(v, (int, float)) for row in run.rows for v in row.values())
    assert restorer.Restorer.from_pretrained(run.out / "model").config["side"] == 16
    first = run.rows[0]
    if stage == "grpo":
        assert first["ratio"] == 1 and first["kl"] == 0 and abs(first["loss"]) < 1e-6 and run.rows[1]["kl"] > 0
        assert first["reward"] == pytest.approx(first["reward/pix"] + 0.2 * first["reward/sem"], rel=1e-5) and first["reward_std"] > 0


CHANGES = {"sft": ["--seed 1", "--lr 2e-3", "--warmup 3", "--weight-decay 0.5", "--max-grad-norm 1e-3", "--batch 2", "--loss eps", "--times logit_normal",
                   "--shift 3"],
           "grpo": ["--group-size 2", "--sampling-steps 2", "--noise 0.3", "--window 1 --early 3", "--early 1 --window 1", "--reward-weights 0 1", "--beta 5",
                    "--mu 2", "--mu 2 --clip 1e-9"]}
ELSEWHERE = {"stage", "model", "data", "images", "side", "vae", "out", "steps", "micro_batch", "encoder", "save_every", "resume", "tracker"}


@pytest.mark.parametrize("stage, flags", [(stage, flags) for stage in CHANGES for flags in CHANGES[stage]])
def test_every_flag_changes_something(lab, stage, flags):
    base = "--mu 2" if "clip" in flags else "--window 1 --early 3 --seed 2" if "--early 1" in flags else ""
    assert not equal(lab.run(stage, base), lab.run(stage, flags + (" --seed 2" if "--early 1" in flags else "")))


def test_no_flag_is_forgotten_above():
    seen = {word[2:].replace("-", "_") for rows in CHANGES.values() for row in rows for word in row.split() if word.startswith("--")}
    assert seen | ELSEWHERE == {f.name for f in fields(train_recover.Config)}


def apart(lab, a: Run, b: Run) -> float:
    """How far two runs ended from each other, as a share of the way that they went."""
    start = restorer.Restorer.from_pretrained(lab.folder / "model").state_dict()
    way = lambda run: torch.cat([(run.weights[name] - start[name]).flatten() for name in start])
    return float((way(a) - way(b)).norm() / way(b).norm())


@both
def test_micro_batches_change_nothing(lab, stage):
    assert apart(lab, lab.run(stage, f"--micro-batch {2 if stage == 'sft' else 4} --save-every 1"), lab.run(stage)) < 1e-2


def test_a_new_restorer_starts_from_the_seed_and_of_the_given_side(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(world, "TRAIN", 20), monkeypatch.setattr(tiny, "WORLD", tmp_path / "world")
    runs = [Run(tmp_path / str(i)) for i in range(2)]
    for run in runs:
        train_recover.main(["--out", str(run.out), "--side", "24", "--steps", "1", "--batch", "2"])     # the drawn world
    assert equal(*runs) and restorer.Restorer.from_pretrained(runs[0].out / "model").config["side"] == 24
    for flags, message in (("--side 20", "multiple of 8"), ("--side 24", "--resume")):
        with pytest.raises(SystemExit, match=message):
            train_recover.main(["--out", str(runs[0].out), *flags.split(), "--steps", "1", "--batch", "2"])


def test_another_encoder_pays_otherwise(lab, monkeypatch):
    base, asked = lab.run("grpo"), []
    monkeypatch.setattr(image_rewards, "load_encoder", lambda name, device: asked.append(name) or (lambda x: x.flatten(1)))
    run = lab.run("grpo", "--encoder mine")
    assert asked == ["mine"] and run.rows[0]["reward/sem"] != base.rows[0]["reward/sem"] and run.rows[0]["reward/pix"] == base.rows[0]["reward/pix"]


LONGER = "--steps 4 --save-every 2"


@pytest.fixture(scope="module")
def killed(lab) -> dict[str, Run]:
    """A run of each stage that got SIGKILL after step 3 was logged and before it was saved."""
    runs = {stage: Run(lab.folder / f"killed-{stage}") for stage in SMALL}
    arguments = {stage: lab.arguments(stage, LONGER, run.out) for stage, run in runs.items()}
    program = KILLED_AFTER_STEP_3.replace('f"train_{name}"', '"train_recover"')
    done = subprocess.run([sys.executable, "-c", program, json.dumps(arguments)], cwd=ROOT, capture_output=True, text=True)
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
    arguments = [("train_recover", lab.arguments(stage, flags, run.out)) for (stage, flags), run in zip(jobs, runs)]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tests/two_ranks.py",
                           json.dumps(arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    for (stage, flags), run in zip(jobs, runs):
        ended = [json.loads((run.out / f"rank-{rank}-ended.json").read_text()) for rank in (0, 1)]
        assert ended[0] == ended[1], "the ranks' weights or their numbers of collectives differ"
        assert apart(lab, run, lab.run(stage, flags)) < 1e-2
        for a, b in zip(lab.run(stage, flags).rows, run.rows, strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
