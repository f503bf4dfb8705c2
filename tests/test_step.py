"""One real step of train_grpo.py against a gradient that is made another way.

The second step of a run is taken: the policy is no longer the reference, T is not 1, there are two
updates on the rollout, the micro-batch does not divide, the pictures have two sizes. Its gradients
and the loss that it logs are compared with those of the model library's plain forward, one response
at a time, with rewards, advantages and loss written out here.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

import train_grpo
from rr1 import data, records, rollout, run_folder, runtime, training

T, BETA, CLIP, CLIP_HIGH, G, WEIGHTS = 0.9, 0.3, 0.2, 0.28, 4, (1.0, 2.0)
FLAGS = (
    f"--steps 2 --prompts 3 --group-size {G} --temperature {T} --beta {BETA} --mu 2 --lr 3e-4 "
    f"--micro-batch 2 --warmup 1 --part all --clip-high {CLIP_HIGH} --reward-weights 1 2"
)


@pytest.fixture(scope="module")
def two_sizes(world_folder, tmp_path_factory) -> Path:
    """Six records, every other picture wider than high."""
    folder = tmp_path_factory.mktemp("two-sizes")
    (folder / "images").mkdir()
    lines = (world_folder / "train.jsonl").read_text().splitlines()[:6]
    for i, line in enumerate(lines):
        name = json.loads(line)["image"]
        picture = Image.open(world_folder / name)
        picture = picture.resize((140, 84)) if i % 2 else picture
        (folder / name).parent.mkdir(exist_ok=True)
        picture.save(folder / name)
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl"


class Watched:
    """What a run sampled, and before each update its weights and its gradients."""

    def __init__(self, monkeypatch):
        self.sampled, self.seeds, self.weights, self.gradients = [], [], [], []
        sample_group, load_model = rollout.sample_group, training.load_model
        update = runtime.update

        def sample(model, prompts, G, seeds, **options):
            self.seeds.append(list(seeds))
            self.sampled.append(sample_group(model, prompts, G, seeds, **options))
            return self.sampled[-1]

        def load(*args):
            self.policy, processor = load_model(*args)
            return self.policy, processor

        def note(*args):
            named = dict(self.policy.named_parameters())
            self.weights.append({name: p.detach().clone() for name, p in named.items()})
            trained = {name: p for name, p in named.items() if p.requires_grad}
            self.gradients.append({name: p.grad.clone() for name, p in trained.items()})
            return update(*args)

        monkeypatch.setattr(rollout, "sample_group", sample)
        monkeypatch.setattr(training, "load_model", load)
        monkeypatch.setattr(runtime, "update", note)
        monkeypatch.setattr(run_folder, "draw_curves", lambda *_: None)


def policy_logps(model, processor, record: dict, ids: list[int]) -> torch.Tensor:
    """log pi(token) of one response, by the library's own forward on the picture's pixels."""
    batch = data.load_batch([record], processor)
    row = torch.tensor([batch.ids[0] + ids])
    logits = model(
        input_ids=row,
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.grid_thw,
        mm_token_type_ids=(row == processor.image_token_id).int(),
    ).logits[0, len(batch.ids[0]) - 1 : -1]
    logits = logits.clone()
    logits[:, processor.banned_ids] = -torch.inf
    return (logits / T).log_softmax(-1)[range(len(ids)), ids]


def types(text: str) -> dict[str, float]:
    found = re.search(r"<TYPE>(.*?)<TYPE_END>", text, re.S)
    pairs = re.findall(r"([a-z ]+?)\((\d\.\d+)\)", found[1]) if found else []
    return {name.strip(): float(s) for name, s in pairs}


def reward(record: dict, text: str, length: int, true_length: int) -> float:
    """w_1 r_deg + w_2 r_len, Eq. 6, 8, 9."""
    named, true = types(text), types(record["response"])
    both = named.keys() & true.keys()
    r_deg = sum(1 - abs(named[t] - true[t]) for t in both) - len(named.keys() ^ true.keys())
    r_len = 1 - abs(length - true_length) / true_length
    return WEIGHTS[0] * r_deg + WEIGHTS[1] * r_len


def advantages(rewards: list[float]) -> list[float]:
    """(R - mean) / std of the group, Eq. 10, 11."""
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    return [(r - mean) / (std + 1e-4) for r in rewards]


def objective(logps, old, reference, advantage: float) -> torch.Tensor:
    """Of each token: min(ratio A, clipped ratio A) - beta k3."""
    ratio = (logps - old).exp()
    clipped = torch.minimum(
        torch.maximum(ratio, torch.tensor(1 - CLIP)), torch.tensor(1 + CLIP_HIGH)
    )
    q = reference - logps
    kl = q.exp() - q - 1
    return torch.minimum(ratio * advantage, clipped * advantage) - BETA * kl


@pytest.mark.parametrize(
    "loss, flags, longest",
    [
        ("grpo", "", 160),
        ("dr_grpo", "", 160),
        ("dapo", "--mask-truncated", 12),
    ],
)
def test_the_gradients_of_the_second_step(
    checkpoint, processor, two_sizes, tmp_path, monkeypatch, loss, flags, longest
):
    seen = Watched(monkeypatch)
    given = f"{FLAGS} {flags} --loss {loss} --max-new-tokens {longest}".split()
    train_grpo.main(
        [
            "--model",
            checkpoint,
            "--data",
            str(two_sizes),
            "--out",
            str(tmp_path / "run"),
            *given,
        ]
    )

    # what was sampled for which record, and what it earned
    found = records.read(two_sizes)
    chosen = [found[i] for i in data.batch_indices(len(found), 3, 1, seed=0)]
    rollouts, A, paid = [], [], []
    for record, group in zip(chosen, seen.sampled[1], strict=True):
        true_length = data.true_length(record, processor)
        earned = []
        for r in group:
            ended = r.ids[-1] == processor.end_id
            assert r.truncated != ended
            text = processor.tokenizer.decode(r.ids)
            earned.append(reward(record, text, len(r.ids) - ended, true_length))
        A += advantages(earned)
        paid += earned
        rollouts += [(record, r) for r in group]
    lines = (tmp_path / "run/rollouts.jsonl").read_text().splitlines()
    second = [row for row in map(json.loads, lines) if row["step"] == 2]
    told = [row["reward"] for row in second]
    assert told == pytest.approx(paid[: len(told)], abs=1e-4) and len(told) >= 4
    counted = [not (r.truncated and "mask" in flags) for _, r in rollouts]
    if flags:
        assert 0 < sum(counted) < len(counted), "some responses must be cut off"
    else:
        assert not any(r.truncated for _, r in rollouts), (
            "--max-new-tokens must not be reached"
        )
    tokens = sum(len(r.ids) for (_, r), counts in zip(rollouts, counted) if counts)

    # the same gradients, one response at a time
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        reference = [
            policy_logps(model, processor, record, r.ids) for record, r in rollouts
        ]
    old, losses = [], []
    for update in (2, 3):  # the first two belong to the first step
        losses.append(0.0)
        model.load_state_dict(seen.weights[update], strict=False)
        model.zero_grad()
        for i, (record, r) in enumerate(rollouts):
            if not counted[i]:
                old.append(None)
                continue
            logps = policy_logps(model, processor, record, r.ids)
            if update == 2:
                old.append(logps.detach())
            per_token = -objective(logps, old[i], reference[i], A[i])
            value = {
                "grpo": per_token.mean() / len(rollouts),
                "dr_grpo": per_token.sum() / (len(rollouts) * longest),
                "dapo": per_token.sum() / tokens,
            }[loss]
            value.backward()
            losses[-1] += value.item()
        mine = dict(model.named_parameters())
        theirs = seen.gradients[update]
        apart = sum((mine[name].grad - g).pow(2).sum() for name, g in theirs.items()) ** 0.5
        whole = sum(g.pow(2).sum() for g in theirs.values()) ** 0.5
        assert whole > 1e-3 and apart / whole < 1e-5, (
            f"update {update}: {apart / whole:.1e}"
        )
    assert any(a is not None and not torch.equal(a, b) for a, b in zip(old, reference))

    # what is logged is the mean over both updates, each on all the parts
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    logged = json.loads(lines[1])["loss"]
    assert abs(logged) > 1e-3 and logged == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_the_random_numbers_of_two_steps_differ(
    checkpoint, two_sizes, tmp_path, monkeypatch
):
    """And what is sampled is what is scored: `sampler_gap` sees it at every temperature."""
    for temperature in ("0.5", "1", "1.7"):
        with monkeypatch.context() as patch:
            seen = Watched(patch)
            out = tmp_path / temperature
            given = (
                f"{FLAGS} --temperature {temperature} --max-new-tokens 10 --mu 1".split()
            )
            argv = [
                "--model",
                checkpoint,
                "--data",
                str(two_sizes),
                "--out",
                str(out),
                *given,
            ]
            train_grpo.main(argv)
        seeds = np.concatenate(seen.seeds)
        assert len(set(seeds)) == len(seeds) == 6
        rows = [
            json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        for row in rows:
            assert 0 < row["sampler_gap"] <= row["sampler_gap_max"] < 1e-4


def test_a_sampler_at_another_temperature_is_seen(
    checkpoint, two_sizes, tmp_path, monkeypatch
):
    seen = Watched(monkeypatch)
    sample_group = rollout.sample_group
    monkeypatch.setattr(
        rollout,
        "sample_group",
        lambda *args, **options: sample_group(*args, **options | {"temperature": 0.5}),
    )
    given = f"{FLAGS} --steps 1 --mu 1 --max-new-tokens 10".split()
    out = tmp_path / "run"
    train_grpo.main(
        ["--model", checkpoint, "--data", str(two_sizes), "--out", str(out), *given]
    )
    row = json.loads((out / "metrics.jsonl").read_text())
    assert row["ratio"] == 1 and row["sampler_gap"] > 0.1 and seen.sampled
