"""Started by torchrun from test_train.py: several training runs one after the other. Each rank
writes what it ended with and how many collectives it took part in to OUT/rank-N-ended.json.

    torchrun --nproc-per-node 2 tests/two_ranks.py '[["train_sft", ["--model", ..]], ..]'
"""

import hashlib
import importlib
import json
import os
import sys

import torch.distributed as dist

from rr1 import data, run_folder, runtime, vlm


def fail_in_step_3() -> None:
    encode, calls = data.encode, []

    def fail(*args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return encode(*args)

    data.encode = fail


def read_other_weights() -> None:
    load = vlm.load

    def load_others(*args, **options):
        model, processor = load(*args, **options)
        for p in model.parameters():
            p.data += 1
        return model, processor

    vlm.load = load_others


def main() -> None:
    if os.environ.get("FAIL") and os.environ["RANK"] == "1":
        fail_in_step_3()
    if os.environ.get("OTHER_WEIGHTS") and os.environ["RANK"] == "1":
        read_other_weights()
    calls = {name: 0 for name in ("all_reduce", "broadcast", "barrier")}

    def counted(name, function):
        def call(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        return call

    for name in calls:
        setattr(dist, name, counted(name, getattr(dist, name)))
    finish = run_folder.RunFolder.finish

    def note_and_finish(run, model, processor):
        digest = hashlib.sha256()
        for p in model.parameters():
            digest.update(p.detach().numpy().tobytes())
        (run.out / f"rank-{run.rt.rank}-ended.json").write_text(
            json.dumps({"weights": digest.hexdigest(), "calls": calls})
        )
        finish(run, model, processor)

    run_folder.RunFolder.finish = note_and_finish
    runtime.teardown = lambda rt: None  # one group of processes serves all runs
    for script, arguments in json.loads(sys.argv[1]):
        calls.update(dict.fromkeys(calls, 0))
        importlib.import_module(script).main(arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
