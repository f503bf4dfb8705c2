"""Runs that are stopped, killed, shared out and resumed: the same weights, bit for bit, and nothing
half-written.

This file is also the small training script that the tests start:
`torchrun tests/test_runtime.py --out FOLDER`.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rr1 import curves, files, run_folder, runtime, shard
from rr1.runtime import opt

ROOT = Path(__file__).resolve().parent.parent
ALONE = runtime.Runtime()


# ---------------------------------------------------------------- the smallest training script


@dataclass
class Config:
    out: str = opt("run", "folder")
    steps: int = opt(6, "steps")
    lr: float = opt(0.01, "learning rate, 100 % of it")
    save_every: int = opt(2, "steps between checkpoints")
    pause: float = opt(0.0, "seconds of sleep after each step")
    words: list[str] = opt(["a", "b"], "some words")
    seed: int = opt(0, "seed")
    resume: bool = opt(False, "go on")
    tracker: str | None = opt(None, "report to this too")


class Net(nn.Module):
    """Three parameters (one frozen, one that never has a gradient) and dropout, saved as models of
    transformers are."""

    def __init__(self):
        super().__init__()
        self.layer, self.frozen, self.unused = (
            nn.Linear(4, 3),
            nn.Linear(4, 4),
            nn.Linear(2, 2),
        )
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        return self.layer(nn.functional.dropout(self.frozen(x), 0.3)) * self.scale

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder) / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder, dtype):
        net = cls()  # draws random numbers, as real ones do
        net.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return net.to(dtype)


class Processor:
    def save_pretrained(self, folder):
        (Path(folder) / "words.json").write_text("[]")


def train(config: Config, rt: runtime.Runtime) -> Net:
    """Every random state there is decides what is learnt."""
    runtime.seed_everything(config.seed + rt.rank)
    panels = {"loss of the step": ["loss"], "draw": ["draw"]}
    run = run_folder.RunFolder(config, rt, panels, free={"save_every", "pause"})
    net = Net()
    shard.broadcast_parameters(net, rt)
    optimizer = runtime.build_optimizer(net, config.lr, weight_decay=0.1)
    first = run.load(net, optimizer)
    with runtime.Interrupt(rt) as interrupt, run.kept(net, Processor(), optimizer):
        for step in range(first + 1, config.steps + 1):
            draws = [
                random.gauss(0, 1),
                np.random.standard_normal(),
                *torch.randn(4).tolist(),
            ]
            loss = (net(torch.tensor(draws[:4])) - torch.tensor(draws[3:])).pow(2).sum()
            loss.backward()
            runtime.sum_gradients(net.parameters(), rt)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * runtime.cosine_with_warmup(
                    step - 1, config.steps, warmup=2
                )
            optimizer.step()
            optimizer.zero_grad()
            metrics = runtime.sum_over_ranks({"loss": loss, "draw": draws[0]}, rt)
            run.log(step, metrics, f"step {step:5d}")
            run.dump(step, [{"text": f"é{step}", "draw": draws[1]}])
            run.end_step(step, interrupt.requested, net, Processor(), optimizer)
            time.sleep(config.pause)
    run.finish(net, Processor())
    return net


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimizer, random states, metrics and rollouts of two finished runs are equal, bit
    for bit."""
    assert {k: v.tolist() for k, v in weights(a).items()} == {
        k: v.tolist() for k, v in weights(b).items()
    }
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (a / name).read_text() == (b / name).read_text()
    a, b = run_folder.checkpoints(a)[-1], run_folder.checkpoints(b)[-1]
    assert a.name == b.name
    for path in a.glob("rank-*.json"):
        assert path.read_text() == (b / path.name).read_text()
    a, b = load_file(a / "optimizer.safetensors"), load_file(b / "optimizer.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of 6 steps that nobody stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(Config(out=str(out)), ALONE)
    return out


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_resume_is_bit_for_bit(whole, tmp_path, steps, monkeypatch, capsys):
    """Stopped after any number of steps, with rubbish left behind: the end is the same."""
    out = tmp_path / "run"
    monkeypatch.setattr(
        runtime,
        "cosine_with_warmup",
        lambda step, _, warmup, f=runtime.cosine_with_warmup: f(step, 6, warmup),
    )
    train(Config(out=str(out), steps=steps), ALONE)
    with (
        open(out / "metrics.jsonl", "a") as metrics,
        open(out / "rollouts.jsonl", "ab") as rollouts,
    ):
        metrics.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
        rollouts.write(
            '{"step": 9, "text": "é'.encode()[:-1]
        )  # cut in the middle of a character
    for rubbish in ("step-000099.tmp", "step-000002.tmp"):
        (out / "checkpoints" / rubbish / "model").mkdir(parents=True)
    (out / "model.tmp").mkdir()
    (out / "curves.png.tmp").write_text("half")
    runtime.seed_everything(12345)
    train(Config(out=str(out), steps=6, save_every=4, resume=True), ALONE)
    assert f"resuming from {out}/checkpoints/step-{steps:06d}" in capsys.readouterr().out
    assert_same_run(whole, out)
    assert not list(out.rglob("*.tmp"))


def test_a_finished_run_has_nothing_left_to_do(whole):
    before = whole.joinpath("metrics.jsonl").read_bytes()
    train(Config(out=str(whole), resume=True), ALONE)
    assert [json.loads(line)["step"] for line in before.splitlines()] == [1, 2, 3, 4, 5, 6]
    assert whole.joinpath("metrics.jsonl").read_bytes() == before


def test_only_the_newest_checkpoints_stay_and_each_is_a_model_folder(whole):
    found = run_folder.checkpoints(whole)
    assert [folder.name for folder in found] == ["step-000004", "step-000006"]
    assert (found[0] / "model" / "words.json").exists()
    assert all(
        torch.equal(tensor, weights(whole)[name])
        for name, tensor in weights(found[1]).items()
    )
    assert set(load_file(found[1] / "optimizer.safetensors")) == {
        f"{layer}.{kind}/{key}"
        for layer in ("layer", "unused")
        for kind in ("weight", "bias")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_dying_at_any_file_operation_leaves_a_resumable_folder(tmp_path, monkeypatch):
    """At each rename, deletion and tensor file of a run in turn; resumed, it ends as a run that did
    not die."""
    whole = tmp_path / "whole"
    train(Config(out=str(whole), steps=4, save_every=1), ALONE)

    class Killed(BaseException):
        pass

    def dies_at(count):
        calls = iter(range(1000))

        def wrap(function):
            def inner(*arguments, **options):
                if next(calls) == count:
                    raise Killed
                return function(*arguments, **options)

            return inner

        return wrap

    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: None)
    for count in range(1000):
        out = tmp_path / str(count)
        with monkeypatch.context() as patch:
            wrap = dies_at(count)
            patch.setattr(run_folder.os, "replace", wrap(os.replace))
            patch.setattr(run_folder.shutil, "rmtree", wrap(run_folder.shutil.rmtree))
            patch.setattr(run_folder, "save_file", wrap(save_file))
            try:
                train(Config(out=str(out), steps=4, save_every=1), ALONE)
                break
            except Killed:
                pass
        train(Config(out=str(out), steps=4, save_every=1, resume=True), ALONE)
        assert_same_run(whole, out)
    assert count > 20


def test_nothing_to_resume(tmp_path, whole, capsys):
    """--resume in an empty place, or in a folder killed before its first checkpoint, starts afresh
    and says so."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n')
    train(Config(out=str(out), resume=True), ALONE)
    assert f"nothing to resume in {out}" in capsys.readouterr().out
    assert_same_run(whole, out)


def test_a_second_run_into_a_folder_is_refused(whole):
    with pytest.raises(
        SystemExit, match="already holds a run: use --resume .* or another --out"
    ):
        train(Config(out=str(whole)), ALONE)


def test_resume_with_another_configuration_names_the_field_and_both_values(whole):
    with pytest.raises(SystemExit) as error:
        train(
            Config(out=str(whole), lr=0.5, words=["c"], resume=True, steps=9, pause=0.1),
            ALONE,
        )
    assert "lr: was 0.01, now 0.5" in str(
        error.value
    ) and "words: was ['a', 'b'], now ['c']" in str(error.value)
    assert "pause" not in str(error.value) and "steps" not in str(error.value)


def test_a_run_of_an_earlier_version_goes_on(whole, tmp_path):
    """Options that are gone say nothing; one that is new is taken to have had its default."""
    shutil.copytree(whole, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    settings["capture"] = False
    del settings["words"]
    path.write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match=r"words: was \['a', 'b'\], now \['c'\]"):
        train(Config(out=str(tmp_path / "run"), words=["c"], resume=True), ALONE)
    state = run_folder.checkpoints(tmp_path / "run")[-1] / "optimizer.safetensors"
    tensors = load_file(state)
    first = next(iter(tensors))
    save_file({first: tensors.pop(first)}, state.with_name("optimizer-1.safetensors"))
    save_file(tensors, state)  # large ones were in several files
    train(Config(out=str(tmp_path / "run"), steps=8, resume=True), ALONE)
    train(Config(out=str(tmp_path / "whole"), steps=8, resume=True), ALONE)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_resume_with_another_number_of_processes_says_so_and_draws_afresh(tmp_path, capsys):
    """Weights and optimizer come back; random states follow from seed and step."""
    states = {}
    for name in ("a", "b", "seed", "step"):
        config = Config(out=str(tmp_path / name), steps=4 if name == "step" else 2)
        train(config, ALONE)
        folder = run_folder.checkpoints(config.out)[-1]
        (folder / "rank-1.json").write_text("{}")  # as if two processes had written it
        config.seed, config.resume = int(name == "seed"), True
        settings = json.loads((tmp_path / name / "config.json").read_text())
        settings["seed"] = config.seed
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        runtime.seed_everything(ord(name[0]))
        run, net = run_folder.RunFolder(config, ALONE, free={"save_every", "pause"}), Net()
        optimizer = runtime.build_optimizer(net, 0.1, 0.0)
        assert run.load(net, optimizer) == config.steps
        for key, tensor in net.state_dict().items():
            assert torch.equal(tensor, weights(tmp_path / name)[key])
        assert optimizer.state[net.layer.weight]["step"] == config.steps
        states[name] = {
            key: files.to_json(state)
            for key, state in run_folder.random_states(ALONE).items()
        }
        said = (
            "2 process(es) wrote it, 1 go on: random states start afresh from seed and step"
        )
        assert said in capsys.readouterr().out
    assert states["a"] == states["b"] and len(set(states["a"].values())) == 3
    for other in ("seed", "step"):
        assert all(states["a"][key] != states[other][key] for key in states["a"])


def test_random_states_make_the_round_trip():
    def draw():
        return random.gauss(0, 1), np.random.standard_normal(), torch.randn(3).tolist()

    draw()  # a Gaussian pair is half used up
    states = json.loads(files.to_json(run_folder.random_states(ALONE)))
    expected = [draw() for _ in range(3)]
    run_folder.set_random_states(states, ALONE)
    assert [draw() for _ in range(3)] == expected


def test_a_real_model_comes_back_bit_for_bit(checkpoint, processor, tmp_path):
    """Qwen2.5-VL, whose names on disk differ from its state dict's and whose embeddings are tied;
    frozen vision in bf16."""
    from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

    model = Qwen.from_pretrained(checkpoint)
    model.model.visual.to(torch.bfloat16).requires_grad_(False)
    optimizer = runtime.build_optimizer(model, 0.01, 0.1)
    for p in model.parameters():
        p.grad = torch.rand_like(p) if p.requires_grad else None
    optimizer.step()
    config = Config(out=str(tmp_path / "run"))
    run_folder.RunFolder(config, ALONE).save(5, model, processor, optimizer)

    other = Qwen.from_pretrained(checkpoint)
    other.model.visual.to(torch.bfloat16).requires_grad_(False)
    again = runtime.build_optimizer(other, 0.5, 0.1)
    config.resume = True
    assert run_folder.RunFolder(config, ALONE).load(other, again) == 5
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert other.lm_head.weight is other.model.language_model.embed_tokens.weight
    for p, q in zip(model.parameters(), other.parameters()):
        assert all(
            torch.equal(value, again.state[q][key])
            for key, value in optimizer.state[p].items()
        )
    assert again.param_groups[0]["lr"] == 0.01


def test_nothing_is_pickled():
    source = Path(run_folder.__file__).read_text() + Path(shard.__file__).read_text()
    assert not re.search(r"torch\.(load|save)\b|import pickle|\beval\(|_object\(", source)


# ---------------------------------------------------------------- killing and stopping


def start(*command: str, out: Path, **environment: str) -> subprocess.Popen:
    environment = (
        os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        | environment
    )
    return subprocess.Popen(
        [sys.executable, *command, str(Path(__file__)), "--out", str(out)]
        + ["--pause", "0.3"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process: subprocess.Popen, beginning: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError("".join(lines))


TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def test_killed_without_warning(whole, tmp_path):
    """SIGKILL torchrun between two steps: its worker dies too, and the resumed run ends with the
    same weights."""
    out = tmp_path / "run"
    process = start(*TORCHRUN, out=out)
    read_until(process, "step     3")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    if sys.platform == "linux":
        process.stdout.read()  # ends when the worker, which holds the other end, is gone
        assert 3 <= len((out / "metrics.jsonl").read_text().splitlines()) < 6
    assert run_folder.checkpoints(out)[-1].name in ("step-000002", "step-000004")
    train(Config(out=str(out), resume=True), ALONE)
    assert_same_run(whole, out)


def test_stopped_in_peace(whole, tmp_path):
    """Ctrl-C: the step ends, is saved, the way on is named, status 130; resumed: equal weights."""
    out = tmp_path / "run"
    process = start(out=out)
    read_until(process, "step     3")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert (
        "ending this step" in said
        and "with --resume goes on" in said
        and "Traceback" not in said
    )
    last = int(re.search(r"stopped after step (\d)", said)[1])
    assert (
        3 <= last < 6
        and run_folder.checkpoints(out)[-1].name == f"step-{last:06d}"
        and (out / "curves.png").exists()
    )
    train(Config(out=str(out), resume=True), ALONE)
    assert_same_run(whole, out)


def test_the_second_interrupt_kills_unless_it_is_the_echo_of_the_first(monkeypatch, capfd):
    killed = []
    monkeypatch.setattr(
        runtime.os, "kill", lambda pid, number: killed.append((pid, number))
    )
    before = signal.getsignal(signal.SIGINT)
    with runtime.Interrupt(ALONE) as interrupt:
        assert not interrupt.requested
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(
            signal.SIGINT
        )  # torchrun hands on what the terminal has already sent
        assert interrupt.requested and not killed
        interrupt._asked -= 2
        signal.raise_signal(signal.SIGTERM)
        assert (
            killed == [(os.getpid(), signal.SIGTERM)]
            and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        )
    assert signal.getsignal(signal.SIGINT) == before
    assert capfd.readouterr().err.count("ending this step") == 1


# ---------------------------------------------------------------- two processes


def check_two_processes(config: Config, rt: runtime.Runtime) -> None:
    """Run by each of two processes; rank 0 has [1, 2], rank 1 has [10, 20] or nothing at all."""
    assert rt.world_size == 2 and torch.distributed.get_backend() == "gloo"
    assert runtime.sum_over_ranks(
        {"b": rt.rank + 1, "a": torch.tensor(2.5, requires_grad=True)}, rt
    ) == {"a": 5.0, "b": 3.0}

    net = Net()  # seeded differently
    shard.broadcast_parameters(net, rt)
    shard.broadcast_parameters(net, rt)  # says nothing: they are the same now
    sums = {name: p.double().sum().item() for name, p in net.named_parameters()}
    assert runtime.sum_over_ranks(sums, rt) == {
        name: 2 * total for name, total in sums.items()
    }

    calls, all_reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda tensor: (
        calls.append(tensor.numel()),
        all_reduce(tensor),
    )
    for has in ("both", "one", "none"):  # as many collectives whatever the data
        net.zero_grad(set_to_none=True)
        if has == "both" or has == "one" and rt.rank == 1:
            net.layer.weight.grad = torch.full((3, 4), 10.0**rt.rank)
        calls.clear()
        runtime.sum_gradients(net.parameters(), rt)
        assert calls == [12, 3, 4, 2], calls
        expected = {"both": 11.0, "one": 10.0, "none": 0.0}[has]
        assert net.layer.weight.grad.unique().tolist() == [expected]
        assert net.unused.weight.grad.abs().sum() == 0 and net.frozen.weight.grad is None
    torch.distributed.all_reduce = all_reduce

    means = runtime.Means()
    means.add("share", [rt.rank == 1, False, False])
    means.add("of a sum", torch.tensor([3.0, 4.0]), count=rt.rank)
    means.add("nothing", 0.0, count=0)
    means.add("share", torch.tensor(True))
    means.add_largest("peak", 1 + rt.rank)
    means.add_largest("peak", -5)
    found = means.over_ranks(rt)
    assert math.isnan(found.pop("nothing"))
    assert found == {"share": 3 / 8, "of a sum": 14.0, "peak": 2.0}

    half = [
        nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
        nn.Parameter(torch.zeros(1, dtype=torch.float64)),
    ]
    half[0].grad, half[1].grad = (
        torch.ones_like(half[0]),
        torch.full_like(half[1], 2.0**-40 + rt.rank),
    )
    runtime.sum_gradients(half, rt)
    assert (
        half[0].grad.dtype == torch.bfloat16 and half[1].grad.item() == 2.0**-39 + 1
    )  # more than float32 can hold

    with runtime.Interrupt(rt) as interrupt:  # one rank is asked, both know
        if rt.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested

    with runtime.main_first(rt):
        marker = Path(config.out + ".marker")
        time.sleep(0.2 * rt.is_main)
        assert marker.exists() == (not rt.is_main)
        marker.touch()

    whole, parts = config.out + "-whole", config.out + "-parts"
    train(Config(out=whole), rt)
    runtime.cosine_with_warmup, original = (
        (lambda step, _, warmup: original(step, 6, warmup)),
        runtime.cosine_with_warmup,
    )
    train(Config(out=parts, steps=3), rt)
    runtime.seed_everything(99)
    net = train(Config(out=parts, resume=True), rt)
    states = [
        json.loads((run_folder.checkpoints(out)[-1] / f"rank-{rt.rank}.json").read_text())
        for out in (whole, parts)
    ]
    assert states[0] == states[1]
    total = runtime.sum_over_ranks({"sum": net.layer.weight.double().sum()}, rt)["sum"]
    assert total == 2 * net.layer.weight.double().sum().item()


def test_two_processes(tmp_path):
    process = start(*TORCHRUN, "--nproc-per-node", "2", out=tmp_path / "run", CHECK="1")
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 0, said
    assert said.count("step     1") == 2  # of each run one line, not one for each rank
    told = (
        "the weights that 1 process(es) had read differed: all go on with those of rank 0"
    )
    assert said.count(told) == 4  # at the start, and of each of three runs
    assert_same_run(tmp_path / "run-whole", tmp_path / "run-parts")
    folder = run_folder.checkpoints(tmp_path / "run-whole")[-1]
    ranks = [
        json.loads((folder / f"rank-{rank}.json").read_text())["generators"]
        for rank in (0, 1)
    ]
    assert len(ranks[0]) == 3 and all(ranks[0][name] != ranks[1][name] for name in ranks[0])


def test_one_process_also_fills_in_missing_gradients():
    net = Net()
    runtime.sum_gradients(net.parameters(), ALONE)
    assert net.layer.weight.grad.abs().sum() == 0 and net.frozen.weight.grad is None
    runtime.sum_gradients([], ALONE)


def test_setup_under_plain_python(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    rt = runtime.setup(7)
    drawn = (random.random(), np.random.random(), torch.rand(1).item())
    runtime.seed_everything(7)
    assert drawn == (random.random(), np.random.random(), torch.rand(1).item())
    assert (rt.rank, rt.world_size, rt.is_main) == (
        0,
        1,
        True,
    ) and not torch.distributed.is_initialized()
    if rt.device.type == "cpu":
        assert rt.dtype == torch.float32
        with rt.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


# ---------------------------------------------------------------- the small parts


def test_optimizer_groups():
    optimizer = runtime.build_optimizer(Net(), lr=0.1, weight_decay=0.3)
    matrices, vectors = optimizer.param_groups
    assert {p.ndim for p in matrices["params"]} == {2} and matrices["weight_decay"] == 0.3
    assert {p.ndim for p in vectors["params"]} == {1} and vectors["weight_decay"] == 0.0
    assert (
        len(matrices["params"] + vectors["params"]) == 4
    )  # the frozen layer is not among them
    with pytest.raises(ValueError, match="nothing to train"):
        runtime.build_optimizer(Net().requires_grad_(False), 0.1, 0.0)


def test_schedule():
    factors = [
        runtime.cosine_with_warmup(step, 110, warmup=10, floor=0.1) for step in range(111)
    ]
    assert (
        factors[:10] == pytest.approx([i / 10 for i in range(1, 11)]) and factors[10] == 1
    )
    assert factors[60] == pytest.approx(0.55) and factors[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:]))
    assert (
        runtime.cosine_with_warmup(500, 110, 10) == pytest.approx(0.1)
        and runtime.cosine_with_warmup(0, 0, 0) == 1
    )


@dataclass
class Options:
    needed: int
    name: str = opt("x", "a name; 50 % of %s")
    rate: float = opt(1e-5, "a rate")
    tree: bool = opt(True, "a switch")
    loss: str = opt("grpo", "a choice", ["grpo", "dapo"])
    max_items: int | None = opt(None, "none or a number")
    levels: list[float] = opt([0.25, 0.5], "numbers")
    words: list[str] = field(default_factory=list)


def test_options():
    config = runtime.parse_config(Options, ["--needed", "3"])
    assert (
        config == Options(3)
        and config.levels == [0.25, 0.5]
        and config.levels is not Options(3).levels
    )
    argv = "--needed 1 --name y --rate 2e-6 --no-tree --loss dapo --max-items 4 --levels 1"
    argv += " --words a b"
    config = runtime.parse_config(Options, argv.split())
    assert config == Options(1, "y", 2e-6, False, "dapo", 4, [1.0], ["a", "b"])


@pytest.mark.parametrize(
    "argv, said",
    [
        ("", "required: --needed"),
        ("--needed x", "invalid int value: 'x'"),
        ("--needed 1 --loss no", "'grpo'"),
        ("--needed 1 --max-item 3", "unrecognized arguments: --max-item 3"),
    ],
)
def test_wrong_options(argv, said, capsys):
    with pytest.raises(SystemExit):
        runtime.parse_config(Options, argv.split())
    assert said in capsys.readouterr().err


def test_help_shows_defaults_and_the_docstring_as_it_is(capsys):
    with pytest.raises(SystemExit):
        runtime.parse_config(Options, ["--help"], "Title\n\n    torchrun  script.py")
    said = capsys.readouterr().out
    assert "\n    torchrun  script.py" in said and "{grpo,dapo}" in said
    assert "50 % of %s (default: x)" in said and "(default: 0.25, 0.5)" in said
    assert "\n  --max-items MAX_ITEMS\n" in said and "_items" not in said
    assert "\n  --tree  " in said and "\n  --no-tree  " in said
    assert "None" not in said and "True" not in said


@pytest.mark.parametrize("words", [["train_grpo.py"], ["evaluate.py"], ["-m", "rr1.u1"]])
def test_help_is_that_of_the_command_and_knows_no_folder_of_this_machine(words):
    done = subprocess.run(
        [sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    prog = "python -m rr1.u1" if words[0] == "-m" else words[0]
    assert done.stdout.startswith(f"usage: {prog} [-h]")
    assert str(ROOT) not in done.stdout and "rr1/tiny/" in done.stdout
    assert not re.search(r"--[a-z]+_|==SUPPRESS==|default: \)", done.stdout)


def test_moments_lie_in_memory_as_their_parameters_do():
    """A fused step takes numbers of both in the order of memory: another order mixes them up."""

    def learner():
        torch.manual_seed(0)
        net = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        return net, runtime.build_optimizer(net, 0.1, 0.0)

    def step(net, optimizer, seed):
        torch.manual_seed(seed)
        net.weight.grad = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
        net.bias.grad = torch.randn(4)
        optimizer.step()

    (net, optimizer), (other, again) = learner(), learner()
    step(net, optimizer, 1)
    other.load_state_dict(net.state_dict())
    saved = {name: t.clone() for name, t in shard.optimizer_state(net, optimizer).items()}
    shard.load_optimizer_state(other, again, saved)
    assert again.state[other.weight]["exp_avg"].stride() == other.weight.stride()
    step(net, optimizer, 2)
    step(other, again, 2)
    assert torch.equal(net.weight, other.weight) and torch.equal(net.bias, other.bias)


def test_three_steps_without_a_finite_gradient_end_a_run(tmp_path, capsys):
    """Each is skipped, and told in the metrics; a fine one in between starts the count anew."""
    run = run_folder.RunFolder(Config(out=str(tmp_path), steps=20, save_every=0), ALONE)
    net = Net()
    optimizer = runtime.build_optimizer(net, 0.1, 0.1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for step, gradient in enumerate(
        [1.0, math.nan, math.inf, 1.0, -math.inf, math.nan], start=1
    ):
        net.layer.weight.grad = torch.full((3, 4), gradient)
        norm = runtime.update(optimizer, ALONE, 0.1, max_grad_norm=1.0)
        assert math.isfinite(norm) == (gradient == 1.0) and net.layer.weight.grad is None
        same = torch.equal(net.layer.weight, before["layer.weight"])
        assert same == (gradient != 1.0)
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        run.log(step, {"grad_norm": norm}, "x")
        run.end_step(step, False, net, Processor(), optimizer)
        assert not run_folder.checkpoints(tmp_path)
    run.log(7, {"grad_norm": math.nan}, "")
    with pytest.raises(SystemExit, match="last 3 steps were not finite.*after step 7"):
        run.end_step(7, False, net, Processor(), optimizer)
    assert [folder.name for folder in run_folder.checkpoints(tmp_path)] == ["step-000007"]
    rows = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["skipped"] for row in rows] == [0, 1, 1, 0, 1, 1, 1] and rows[1][
        "grad_norm"
    ] is None


def test_save_every_0_is_never_but_at_the_end(tmp_path):
    train(Config(out=str(tmp_path / "run"), save_every=0), ALONE)
    assert [folder.name for folder in run_folder.checkpoints(tmp_path / "run")] == [
        "step-000006"
    ]


@pytest.mark.parametrize("when, kept", [("before", 3), ("after", 2)])
def test_an_error_does_not_lose_the_steps_that_were_done(
    whole, tmp_path, monkeypatch, capsys, when, kept
):
    """Before the optimizer's step the weights are those of the last one; after it, of none."""
    out, update = tmp_path / "run", torch.optim.AdamW.step
    steps = iter(range(1, 100))

    def fail(*args, **options):
        now = next(steps) == 4
        if now and when == "before":
            raise RuntimeError("out of memory")
        update(*args, **options)
        if now:
            raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(torch.optim.AdamW, "step", fail)
        train(Config(out=str(out)), ALONE)
    said = f"RuntimeError in step 4: --resume goes on from step-{kept:06d}"
    assert said in capsys.readouterr().out
    assert run_folder.checkpoints(out)[-1].name == f"step-{kept:06d}"
    train(Config(out=str(out), resume=True), ALONE)
    assert_same_run(whole, out)


def test_a_start_that_fails_does_not_occupy_its_folder(whole, tmp_path):
    """Nor does the list of bad records that it left speak of the data of the next start."""
    run_folder.RunFolder(Config(out=str(tmp_path / "run"), lr=5.0), ALONE)
    (tmp_path / "run" / "skipped.json").write_text("{}")
    train(Config(out=str(tmp_path / "run")), ALONE)
    assert not (tmp_path / "run" / "skipped.json").exists()
    assert_same_run(whole, tmp_path / "run")


def test_log_writes_plain_json_and_one_line(tmp_path, capsys):
    run = run_folder.RunFolder(Config(out=str(tmp_path)), ALONE)
    run.log(1, {"loss": torch.tensor(0.5), "norm": float("nan"), "tokens": 7}, "one")
    run.log(2, {"loss": 0.25}, "two")
    assert capsys.readouterr().out == "one\ntwo\n"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    first = {"step": 1, "loss": 0.5, "norm": None, "tokens": 7.0}
    assert rows == [first, {"step": 2, "loss": 0.25}]
    assert json.loads((tmp_path / "config.json").read_text())["words"] == ["a", "b"]


def test_the_other_ranks_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_folder, "barrier", lambda rt: None)
    run = run_folder.RunFolder(
        Config(out=str(tmp_path / "run")), runtime.Runtime(rank=1, world_size=2)
    )
    run.log(1, {"loss": 1.0}, "x")
    run.dump(1, [{}])
    run.draw()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_curves(tmp_path, monkeypatch):
    """curves.png is drawn as the run goes, one axes a panel, with gaps and missing metrics; the
    picture is not blank."""
    import matplotlib.figure
    import matplotlib.image

    drawn = []
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda figure, *a, f=matplotlib.figure.Figure.savefig, **k: (
            drawn.append(figure),
            f(figure, *a, **k),
        ),
    )
    run = run_folder.RunFolder(
        Config(out=str(tmp_path)),
        ALONE,
        {"loss": ["loss"], "the terms": ["part/*"], "absent": ["absent"]},
    )
    for step in range(1, 41):
        run.log(
            step,
            {
                "loss": 1 / step,
                "part/a": float("nan") if step % 2 else step,
                "part/never": float("nan"),
                **({"part/b": 3} if step == 7 else {}),
            },
            "",
        )
    assert not drawn
    run._drawn -= 61
    run.log(41, {"loss": 0.01}, "")
    assert len(drawn) == 1
    loss, terms = drawn[0].axes
    assert (loss.get_title(), terms.get_title(), loss.get_xlabel()) == (
        "loss",
        "the terms",
        "step",
    )
    assert [text.get_text() for text in terms.get_legend().get_texts()] == [
        "part/a",
        "part/b",
    ]
    assert loss.lines[0].get_ydata()[0] == 1.0 and len(terms.lines[0].get_xdata()) == 20
    image = matplotlib.image.imread(tmp_path / "curves.png")
    assert (
        image.shape[0] > 200
        and image.shape[1] > 600
        and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50
    )
    assert np.allclose(curves.smooth(np.full(100, 2.0)), 2.0)
    assert np.allclose(curves.smooth(np.arange(100.0))[5:-5], np.arange(100.0)[5:-5])


def test_trackers_are_imported_only_when_asked(tmp_path, monkeypatch):
    sent = []
    fake = types.SimpleNamespace(
        init=lambda **options: types.SimpleNamespace(
            log=lambda values, step: sent.append((step, values))
        )
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_folder.RunFolder(Config(out=str(tmp_path / "a")), ALONE).log(1, {"loss": 2.0}, "")
    assert not sent
    run_folder.RunFolder(Config(out=str(tmp_path / "b"), tracker="wandb"), ALONE).log(
        1, {"loss": 2.0}, ""
    )
    assert sent == [(1, {"loss": 2.0})]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        run_folder.RunFolder(Config(out=str(tmp_path / "c"), tracker="wandb"), ALONE).log(
            1, {"loss": 2.0}, ""
        )


LEAVE = """
import atexit, sys
from rr1 import runtime
rt = runtime.setup(0)
atexit.register(print, f"last words of {rt.rank}")
if len(sys.argv) > 1:
    raise SystemExit("broken")
runtime.teardown(rt)
print("left")
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_that_has_left_ends_at_once_but_not_before_others_last_words(
    tmp_path, fails
):
    (tmp_path / "leave.py").write_text(LEAVE)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(tmp_path / "leave.py"),
            *["fail"] * fails,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode != 0) == fails and done.stdout.count("left") == 2 * (not fails)
    assert fails or "last words of 0" in done.stdout and "last words of 1" in done.stdout


END = """
import atexit, sys
from rr1 import runtime
atexit.register(print, "taken apart")
atexit.register(runtime._end)
if sys.argv[1] == "3":
    raise SystemExit(3)
if sys.argv[1] == "1":
    raise RuntimeError
"""


@pytest.mark.parametrize("status", [0, 1, 3])
def test_an_exit_status_after_teardown_is_kept(tmp_path, status):
    (tmp_path / "end.py").write_text(END)
    command = [sys.executable, str(tmp_path / "end.py"), str(status)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == status
    assert ("taken apart" in done.stdout) == (status > 0)


if __name__ == "__main__":
    options = runtime.parse_config(Config)
    here = runtime.setup(options.seed)
    if os.environ.get("CHECK"):
        check_two_processes(options, here)
    else:
        train(options, here)
    runtime.teardown(here)
