"""What does the projection to a large vocabulary cost in memory, in chunks and whole? (`rr1.vlm.token_logps`)

    python bench/projection.py                  # 1,024 tokens of 8 responses, a vocabulary of 151,936, forward and backward

Each in a process of its own, one thread; the peak is that of the process, less what it had before.
"""
from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

from rr1 import runtime
from rr1.runtime import opt
from rr1.evaluation.statistics import markdown


@dataclass
class Config:
    vocabulary: int = opt(151_936, "tokens to choose from; that of Qwen2.5-VL-3B")
    tokens: int = opt(8 * 128, "response tokens")
    hidden: int = opt(256, "hidden size")
    worker: str = opt("", "for the processes themselves", ["", "whole", "chunked"])


def measure(config: Config) -> dict[str, float]:
    """-> {"mib": what the forward and backward pass adds to this process's peak, "seconds"}."""
    import torch

    from rr1 import vlm
    if config.worker == "whole":
        vlm.LOGITS_AT_ONCE = 2**62
    torch.manual_seed(0)
    model = SimpleNamespace(lm_head=torch.nn.Linear(config.hidden, config.vocabulary, bias=False),
                            config=SimpleNamespace(text_config=SimpleNamespace(vocab_size=config.vocabulary)))
    hidden, targets = torch.randn(config.tokens, config.hidden, requires_grad=True), torch.randint(config.vocabulary, (config.tokens,))
    model.lm_head.weight.grad, peak = torch.zeros_like(model.lm_head.weight), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, start = peak(), time.perf_counter()
    logps, _ = vlm.token_logps(model, hidden, targets, with_entropy=True)
    logps.sum().backward()
    return {"mib": peak() - before, "seconds": time.perf_counter() - start}


def main(argv: list[str] | None = None) -> None:
    config = runtime.parse_config(Config, argv, __doc__)
    if config.worker:
        return print(json.dumps(measure(config)))
    rows = []
    for kind in ("whole", "chunked"):
        command = [sys.executable, __file__, "--worker", kind, *(f"--{name}={getattr(config, name)}" for name in ("vocabulary", "tokens", "hidden"))]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout)
        rows.append([kind, f"{found['mib']:.0f}", f"{found['seconds']:.1f}"])
    print(markdown(["", "MiB added to the peak", "seconds"], rows))


if __name__ == "__main__":
    main()
