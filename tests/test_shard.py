"""Sharded over two processes, the scripts do what they do in one: the same step, the same samples,
the same files, and a run goes on with another number of processes.

torchrun starts this file twice (gloo): everything that needs two processes happens in one run,
`main` below, whose results the tests read.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers.modeling_utils
from conftest import random_model
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from rr1 import data, records, rollout, run_folder, runtime, shard, vlm

ROOT = Path(__file__).resolve().parent.parent
PATH = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}

SFT = (
    "--steps 3 --batch 4 --micro-batch 1 --lr 1e-3 --warmup 1 --save-every 1 "
    "--gradient-checkpointing"
)
GRPO = (
    "--steps 1 --prompts 4 --group-size 4 --max-new-tokens 12 --micro-batch 1 --lr 1e-3 "
    "--warmup 1 --mu 2"
)
JOBS = {
    "sft": SFT,
    "sft-other": SFT + " --seed 1",
    "grpo": GRPO,
    "grpo-other": GRPO + " --seed 1 --max-new-tokens 5 --mask-truncated",
    "grpo-untied": GRPO,
}  # a projection of its own, as the 7B model has it


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, gathered where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def arguments(folder: Path, name: str, flags: str) -> tuple[str, list[str]]:
    """The script's module and its command line."""
    inputs = json.loads((folder / "inputs.json").read_text())
    return f"train_{name.split('-')[0]}", [
        "--model",
        inputs["untied" if "untied" in name else "model"],
        "--data",
        inputs["data"],
        "--out",
        str(folder / name),
        *flags.split(),
    ]


class Collectives(TorchDispatchMode):
    """Counts them by name, those of FSDP, of DTensor and our own."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # which takes it apart, and then comes here
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------- what the two processes do


def train(folder: Path, name: str, flags: str) -> dict:
    """Run a script; what it did that its folder does not show."""
    seen, originals = (
        {"sharded": [], "came on": set(), "checkpointed": 0},
        (shard.shard, transformers.modeling_utils.checkpoint),
    )

    def note_shard(model, rt):
        seen["sharded"].append(model)
        seen["came on"] |= {p.device.type for p in model.model.language_model.parameters()}
        return originals[0](model, rt)

    def note_checkpoint(*args, **options):
        seen["checkpointed"] += 1
        return originals[1](*args, **options)

    shard.shard, transformers.modeling_utils.checkpoint = note_shard, note_checkpoint
    module, argv = arguments(folder, name, flags)
    with Collectives() as collectives:
        importlib.import_module(module).main(argv)
    shard.shard, transformers.modeling_utils.checkpoint = originals
    models = seen["sharded"]
    return {
        "collectives": collectives.counts,
        "checkpointed": seen["checkpointed"],
        "sharded": len(models),
        "came on": sorted(seen["came on"]),
        "one tower": len({id(model.model.visual) for model in models}) == 1,
        "here": [
            sum(
                p.to_local().numel() if isinstance(p, DTensor) else 0
                for p in model.parameters()
            )
            for model in models
        ],
        "whole": [
            sum(p.numel() for name, p in model.named_parameters() if ".visual." not in name)
            for model in models
        ],
    }


def stop_and_go_on(folder: Path) -> None:
    """The SFT run again, stopped after its first step, and after its second."""
    log = run_folder.RunFolder.log
    for step, flags in ((1, ""), (2, " --resume")):

        def press(run, now, *rest):
            log(run, now, *rest)
            if now == step and run.rt.rank == 1:
                signal.raise_signal(signal.SIGINT)

        run_folder.RunFolder.log = press
        runtime.seed_everything(77)
        module, argv = arguments(folder, "sft-stopped", SFT + " --shard" + flags)
        with contextlib.suppress(SystemExit):
            importlib.import_module(module).main(argv)
        run_folder.RunFolder.log = log


def sample(model, processor, found, rt) -> list:
    """Each rank its own prompts and lengths of response."""
    options = dict(
        end_id=processor.end_id,
        max_new_tokens=(5, 14)[rt.rank],
        banned=processor.banned_ids,
    )
    prompts = data.encode(
        model, data.load_batch(found[rt.rank : 3 * rt.rank + 2], processor)
    )
    seeds = [rt.rank + seed for seed in range(len(prompts))]
    with shard.gathered(model.eval()):
        found = rollout.sample_group(model, prompts, 3, seeds, **options)
    return [(r.ids, r.logps) for group in found for r in group]


def gradients(
    model, processor, found, rt
) -> tuple[float, dict[str, torch.Tensor], list[bool]]:
    """Loss and gradients of each rank's own two records, both summed over the ranks; and whether
    each layer was in shards before the backward pass."""
    mine = found[rt.rank :: 2][:2]
    with rt.autocast():
        prompts = data.encode(model.train(), data.load_batch(mine, processor))
        logps, mask, _ = shard.forward(
            model,
            vlm.group_logps,
            prompts,
            [[processor.response_ids(r["response"])] for r in mine],
        )
    freed = [
        all(isinstance(p, DTensor) for p in layer.parameters())
        for layer in model.model.language_model.layers
    ]
    loss = -(logps * mask).mean()
    loss.backward()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    runtime.sum_gradients([p for _, p in trainable], rt)
    return (
        runtime.sum_over_ranks({"loss": loss}, rt)["loss"],
        {name: whole(p.grad) for name, p in trainable},
        freed,
    )


def compare(folder: Path, rt: runtime.Runtime) -> dict:
    """A whole model and a sharded one side by side, in float32 and in bfloat16 as on a GPU."""
    inputs, said = json.loads((folder / "inputs.json").read_text()), {}
    found_records = records.read(inputs["data"])
    for dtype in (torch.float32, torch.bfloat16):
        runtime.Runtime.dtype = property(lambda self, dtype=dtype: dtype)
        (one, processor), (other, _) = (
            vlm.load(inputs["model"]),
            vlm.load(inputs["model"], device="cpu" if rt.is_main else "meta"),
        )
        vlm.freeze_vision(one), vlm.freeze_vision(other)
        shard.shard(other, rt)
        if dtype == torch.float32:
            found = dict([*other.named_parameters(), *other.named_buffers()])
            same = {
                name: torch.equal(tensor, whole(found[name]))
                for name, tensor in [*one.named_parameters(), *one.named_buffers()]
            }
            said |= {
                "apart": [name for name, equal in same.items() if not equal],
                "buffers": len(list(one.buffers())),
                "tied": other.lm_head.weight is other.get_input_embeddings().weight,
            }
            a = sample(one, processor, found_records, rt)
            with Collectives() as collectives:
                b = sample(other, processor, found_records, rt)
            said |= {
                "samples": [a, b],
                "collectives": collectives.counts,
                "kept": all(
                    isinstance(p, DTensor) for p in other.parameters() if p.requires_grad
                ),
            }
        (loss, grads, _), (sharded_loss, sharded_grads, freed) = (
            gradients(model, processor, found_records, rt) for model in (one, other)
        )
        apart = max(
            float(
                (grads[name] - sharded_grads[name]).norm()
                / grads[name].norm().clamp(min=1e-6)
            )
            for name in grads
        )
        said[str(dtype)] = {
            "losses": [loss, sharded_loss],
            "apart": apart,
            "dtypes": sorted({str(g.dtype) for g in sharded_grads.values()}),
            "names": grads.keys() == sharded_grads.keys(),
            "freed": freed,
        }
    parameters = [p for p in other.parameters() if p.requires_grad]
    if rt.rank == 1:
        parameters[0].grad.to_local()[0, 0] = float(
            "nan"
        )  # in the shard of one rank alone: both must stop
    try:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    except RuntimeError as error:
        said["nan"] = str(error)
    return said


def main(folder: Path) -> None:
    rt = runtime.setup(0)
    runtime.teardown = lambda rt: None  # one group of processes serves all runs
    run_folder.draw_curves = lambda *_: None
    said = {name: train(folder, name, flags + " --shard") for name, flags in JOBS.items()}
    stop_and_go_on(folder)
    said["compare"] = compare(folder, rt)
    (folder / f"rank-{rt.rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


# ---------------------------------------------------------------- what the tests read


@pytest.fixture(scope="module")
def inputs(checkpoint, world_folder, processor, tmp_path_factory) -> dict:
    untied = tmp_path_factory.mktemp("untied")
    model = random_model(processor.tokenizer)
    projection = model.lm_head.weight.detach().clone()
    model.config.tie_word_embeddings, model.config.text_config.tie_word_embeddings = (
        False,
        False,
    )
    model.lm_head.weight = torch.nn.Parameter(projection.flip(1) + projection)
    model.save_pretrained(untied), processor.save_pretrained(untied)
    return {
        "model": checkpoint,
        "untied": str(untied),
        "data": f"{world_folder}/train.jsonl",
    }


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "inputs.json").write_text(json.dumps(inputs))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            __file__,
            str(folder),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"} | PATH,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The same runs in this process, on the joint batch."""
    folder, done = tmp_path_factory.mktemp("alone"), {}
    (folder / "inputs.json").write_text(json.dumps(inputs))

    def run(name: str) -> Path:
        if name not in done:
            module, argv = arguments(folder, name, JOBS[name])
            importlib.import_module(module).main(argv)
            done[name] = folder / name
        return done[name]

    return run


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(run_folder, "draw_curves", lambda *_: None)


def assert_close(a: Path, b: Path, start: str) -> None:
    """Two model folders are the same within rounding, measured by the way that training went."""
    a, b, start = (load_file(Path(path) / "model.safetensors") for path in (a, b, start))
    assert a.keys() == b.keys() == start.keys()
    a, b = (
        torch.cat([(tensors[name] - start[name]).flatten() for name in start])
        for tensors in (a, b)
    )
    assert b.norm() > 0 and (a - b).norm() < 1e-3 * b.norm()


def rows(run: Path) -> list[dict]:
    clocks = ("seconds", "tokens_per_second")
    return [
        {
            key: value
            for key, value in json.loads(line).items()
            if not key.startswith(clocks)
        }
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("name", JOBS)
def test_a_sharded_step_is_the_step_of_one_process(folder, alone, inputs, name):
    """SFT with gradient checkpointing, GRPO with two updates a rollout: weights and all metrics."""
    assert_close(
        folder / name / "model",
        alone(name) / "model",
        inputs["untied" if "untied" in name else "model"],
    )
    for a, b in zip(rows(folder / name), rows(alone(name)), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_a_projection_of_its_own_is_trained_and_written(folder, inputs):
    before, after = (
        load_file(Path(path) / "model.safetensors")
        for path in (inputs["untied"], folder / "grpo-untied" / "model")
    )
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        (key,) = [
            key
            for key in after
            if key.endswith(name)
            or key.endswith(name.replace("model.language_model", "model"))
        ]
        assert not torch.equal(before[key], after[key])


def test_each_process_keeps_its_half(ranks):
    """Policy and reference, after the last step; one vision tower serves both."""
    for said in ranks:
        for name in JOBS:
            assert (
                said[name]["sharded"] == (1 if "sft" in name else 2)
                and said[name]["one tower"]
            )
            for here, whole in zip(said[name]["here"], said[name]["whole"]):
                assert 0.48 * whole < here < 0.52 * whole


def test_only_rank_0_reads_the_weights_and_all_get_them(ranks):
    """Bit for bit, with the buffers that are in no file (rotary frequencies) and the tied
    projection."""
    for rank, said in enumerate(ranks):
        assert all(said[name]["came on"] == [("cpu", "meta")[rank]] for name in JOBS)
        assert (
            said["compare"]["apart"] == []
            and said["compare"]["buffers"] >= 3
            and said["compare"]["tied"]
        )


def test_checkpointing_computes_every_layer_again(ranks):
    """Two layers, two micro-batches, three steps."""
    assert all(
        said["sft"]["checkpointed"] == 2 * 2 * 3 and said["grpo"]["checkpointed"] == 0
        for said in ranks
    )


def test_collectives_do_not_depend_on_the_data(ranks):
    """Nor on the rank, nor on how long the responses become."""
    for name in ("sft", "grpo"):
        counts = [
            said[job]["collectives"] for said in ranks for job in (name, name + "-other")
        ]
        assert all(count == counts[0] for count in counts)
        assert sum(counts[0].values()) > 10, counts[0]


def test_gathered_samples_are_the_same_tokens(ranks):
    """However many tokens a rank writes, each layer is gathered once, and the outer piece once;
    after it all is in shards again."""
    for said in ranks:
        (a, b), counts = said["compare"]["samples"], said["compare"]["collectives"]
        assert [ids for ids, _ in a] == [ids for ids, _ in b]
        for (_, one), (_, other) in zip(a, b):
            assert one == pytest.approx(other, abs=1e-5)
        assert sum(counts.values()) == 3 and said["compare"]["kept"], counts
    short, long = (
        max(len(ids) for ids, _ in said["compare"]["samples"][0]) for said in ranks
    )
    assert short <= 5 < long


def test_after_sampling_a_layer_is_freed_between_forward_and_backward_again(ranks):
    """The float32 model has sampled before its pass, the bfloat16 one has not."""
    for said in ranks:
        for dtype in ("torch.float32", "torch.bfloat16"):
            assert said["compare"][dtype]["freed"] == [True, True], dtype


def test_gradients_are_summed_in_float32_also_where_layers_travel_in_bfloat16(ranks):
    for dtype, tolerance in (("torch.float32", 1e-4), ("torch.bfloat16", 0.1)):
        said = ranks[0]["compare"][dtype]
        assert (
            said["names"]
            and said["dtypes"] == ["torch.float32"]
            and said["apart"] < tolerance
        ), said
        assert said["losses"][0] == pytest.approx(said["losses"][1], rel=tolerance / 10)


def test_a_gradient_that_is_not_finite_stops_every_rank(ranks):
    assert all("non-finite" in said["compare"]["nan"] for said in ranks)


def test_the_model_that_is_written_is_an_ordinary_checkpoint(folder, alone):
    from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

    for path in (
        folder / "grpo" / "model",
        folder / "sft" / "checkpoints" / "step-000003" / "model",
    ):
        assert (path / "config.json").read_text() == (
            alone("sft") / "model" / "config.json"
        ).read_text()
        model, tensors = Qwen.from_pretrained(path), load_file(path / "model.safetensors")
        state = model.state_dict()
        assert len({tensor.data_ptr() for tensor in state.values()}) == len(tensors), (
            "tied weights are written once"
        )
        assert torch.equal(
            state["model.language_model.norm.weight"],
            next(t for name, t in tensors.items() if name.endswith("model.norm.weight")),
        )
        ours, processor = vlm.load(str(path))
        ids = torch.tensor([processor.prompt_ids("what is it?", [])])
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_stopped_on_two_processes_it_goes_on_on_two_and_then_on_one(
    folder, alone, checkpoint, capsys
):
    """On as many, bit for bit; on another number within rounding, since nothing random decides what
    these scripts learn."""
    stopped, whole = folder / "sft-stopped", folder / "sft"
    a, b = (run / "checkpoints" / "step-000002" for run in (stopped, whole))
    for file in ("optimizer.safetensors", "model/model.safetensors"):
        one, other = load_file(a / file), load_file(b / file)
        assert one.keys() == other.keys() and all(
            torch.equal(one[name], other[name]) for name in one
        )
    for rank in (0, 1):
        assert (a / f"rank-{rank}.json").read_text() == (
            b / f"rank-{rank}.json"
        ).read_text()
    go_on = folder / "alone" / "sft-stopped"
    shutil.copytree(stopped, go_on)
    shutil.copy(folder / "inputs.json", go_on.parent)
    module, argv = arguments(go_on.parent, "sft-stopped", SFT + " --resume")
    importlib.import_module(module).main(argv)
    assert (
        "2 process(es) wrote it, 1 go on: random states start afresh"
        in capsys.readouterr().out
    )
    assert_close(go_on / "model", alone("sft") / "model", checkpoint)
    assert [row["step"] for row in rows(go_on)] == [1, 2, 3] and len(
        list((go_on / "checkpoints" / "step-000003").glob("rank-*"))
    ) == 1


# ---------------------------------------------------------------- one process


def test_alone_nothing_is_sharded(checkpoint):
    model, _ = vlm.load(checkpoint)
    kind, state = (
        type(model),
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )
    assert shard.shard(model, runtime.Runtime()) is model and type(model) is kind
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()
    )
    assert shard.forward(model, lambda m, x, y: (m, x, y), 1, y=2) == (model, 1, 2)
    with shard.gathered(model):
        assert type(model) is kind


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused(monkeypatch):
    import train_sft

    monkeypatch.setattr(runtime, "setup", lambda seed: runtime.Runtime(world_size=4))
    with pytest.raises(
        SystemExit,
        match="--batch 6 cannot be shared out evenly to 4 processes.*give a multiple of 4",
    ):
        train_sft.main(["--shard", "--batch", "6"])


# ---------------------------------------------------------------- the real configuration

REAL = ROOT.parent / "shared" / "qwen2.5-vl-3b"


def write_real(folder: Path, layers: int | None, shard_size: str) -> str:
    """The 3B configuration, with `layers` layers in each tower or all of them, random weights in
    bfloat16, the real tokenizer."""
    from transformers import (
        AutoImageProcessor,
        AutoTokenizer,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    from rr1.tiny.model import CHAT_TEMPLATE

    config = Qwen2_5_VLConfig.from_pretrained(REAL)
    if layers:
        config.text_config.num_hidden_layers, config.text_config.layer_types = (
            layers,
            ["full_attention"] * layers,
        )
        config.vision_config.depth, config.vision_config.fullatt_block_indexes = (
            layers,
            [layers - 1],
        )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration._from_config(
        config, dtype=torch.bfloat16
    ).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    vlm.Processor(
        tokenizer, AutoImageProcessor.from_pretrained(REAL, backend="pil")
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def real_checkpoint(tmp_path_factory) -> str:
    """Two layers in each tower: 0.53 B parameters."""
    return write_real(tmp_path_factory.mktemp("real"), 2, "50GB")


@pytest.mark.slow
@pytest.mark.skipif(
    not REAL.exists(), reason="the real model's configuration is not beside the repository"
)
def test_the_real_configuration(real_checkpoint, world_folder, tmp_path):
    """SFT, stopped and gone on with on the other number of processes, and GRPO, on one process and
    on two: the same losses, and a model that plain transformers loads. Needs about 20 GB of memory,
    25 GB of disk and some minutes."""
    from transformers import AutoModelForImageTextToText

    def script(n: int, name: str, out: Path, flags: str) -> None:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(n),
                f"train_{name}.py",
                "--model",
                real_checkpoint,
                "--data",
                f"{world_folder}/train.jsonl",
                "--out",
                str(out),
                "--shard",
                "--gradient-checkpointing",
                "--micro-batch",
                "1",
                "--warmup",
                "1",
                *flags.split(),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]

    (tmp_path / "mine.py").write_text(
        "def letters(response, record):\n    return len(response) % 7\n"
    )
    found = {}
    for n in (1, 2):
        sft, rl = tmp_path / f"sft{n}", tmp_path / f"grpo{n}"
        script(n, "sft", sft, "--steps 1 --batch 2 --lr 1e-4")
        script(3 - n, "sft", sft, "--steps 2 --batch 2 --lr 1e-4 --resume")
        script(
            n,
            "grpo",
            rl,
            "--steps 1 --prompts 2 --group-size 2 --max-new-tokens 4 --lr 1e-5 "
            f"--rewards {tmp_path}/mine.py:letters",
        )
        found[n] = rows(sft) + rows(rl)
        model = AutoModelForImageTextToText.from_pretrained(rl / "model")
        assert sum(p.numel() for p in model.parameters()) == sum(
            p.numel() for p in load_file(rl / "model" / "model.safetensors").values()
        )
        assert (
            len(rows(sft)) == 2
            and rows(sft)[1]["loss"] < rows(sft)[0]["loss"]
            and rows(rl)[0]["kl"] == 0 < rows(rl)[0]["grad_norm"]
        )
        del model
        shutil.rmtree(sft), shutil.rmtree(rl)
    for a, b in zip(found[1], found[2], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    not REAL.exists(), reason="the real model's configuration is not beside the repository"
)
def test_the_whole_real_model(tmp_path, world_folder):
    """All 3.75 B parameters in bfloat16, from a folder of several files: one forward pass and a
    rollout of 8 tokens, whose log-probabilities the scoring path confirms. Needs about 16 GB of
    memory, 8 GB of disk and some minutes."""
    model, processor = vlm.load(
        write_real(tmp_path / "model", None, "2GB"), dtype=torch.bfloat16
    )
    assert (
        len(list((tmp_path / "model").glob("*.safetensors"))) > 2
        and 3.7e9 < sum(p.numel() for p in model.parameters()) < 3.8e9
    )
    vlm.freeze_vision(model)
    found = [
        record for record, _ in zip(records.read(world_folder / "train.jsonl"), range(2))
    ]
    prompts = data.encode(model, data.load_batch(found, processor))
    groups = rollout.sample_group(
        model,
        prompts,
        2,
        [0, 1],
        end_id=processor.end_id,
        max_new_tokens=8,
        banned=processor.banned_ids,
    )
    assert all(
        1 <= len(r.ids) <= 8 and not set(r.ids) & set(processor.banned_ids)
        for group in groups
        for r in group
    )
    with torch.no_grad():
        logps, mask, _ = vlm.group_logps(
            model,
            prompts,
            [[r.ids for r in group] for group in groups],
            banned=processor.banned_ids,
        )
    for row, inside, r in zip(logps, mask.bool(), (r for group in groups for r in group)):
        assert row[inside].tolist() == pytest.approx(
            r.logps, abs=0.1
        )  # bfloat16, in another order of sums
    assert (
        torch.isfinite(logps).all() and logps[mask.bool()].max() < -1
    )  # random weights are sure of nothing


if __name__ == "__main__":
    main(Path(sys.argv[1]))
