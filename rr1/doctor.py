"""What ails a run? Reads its folder and names the common troubles that it has.

    python -m rr1.doctor runs/grpo

Each trouble is printed with the step and the line of metrics.jsonl that show it, and with what to
do. metrics.jsonl is read, and config.json and rollouts.jsonl where they exist. Nothing is changed,
so a run may be looked at while it goes on. These are signs, not proofs: every limit is a constant
below, with its reason. docs/learn/questions.md explains the troubles.

The exit status is 2 where the folder cannot be read, otherwise 0.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from operator import gt, lt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from rr1.chain import parse

WINDOW = 10  # steps to average over: a single step jumps, since each has other pictures
FLAT = 2.0  # standard errors: a smaller rise of the reward could be luck
ZERO_SPREAD = 0.5  # share of groups: above it, most of the sampling teaches nothing
ENTROPY = 0.25  # of that at the start: a policy that learns grows surer, but not fourfold
LONGER = 1.5  # times the length at the start: r_len alone moves it by tenths
SHORTER = 0.5  # times the length at the start: half the tokens is a section or two gone
KL = 0.5  # nats per token: 0.02 went with better rewards, above 1 the policy was destroyed
CUT_OFF = 0.5  # share of responses: what is cut off is not well-formed
APART = 0.1  # nats per token: rounding in bfloat16 gives a few hundredths
SILENT = 0.25  # share of responses: an unsure policy is silent now and then
PAID = -0.05  # mean advantage of the silent: below it, silence is being unlearnt
SLOW = 2.0  # times the median step: longer responses alone seldom double a step
SLOW_STEPS = 3  # one or two slow steps may be a cold start and a checkpoint


class Rule(NamedTuple):
    """A trouble: the mean of a metric over the last steps is beyond a limit."""

    trouble: str
    metric: str
    beyond: Callable[[float, float], bool]
    limit: float
    advice: str  # {option} stands for the run's own
    of_start: bool = False  # the limit is a multiple of the mean over the first steps


RULES = [
    Rule(
        "zero spread within groups",
        "zero_std",
        gt,
        ZERO_SPREAD,
        "more varied prompts, a finer reward, or a higher --temperature (now {temperature})",
    ),
    Rule(
        "collapse",
        "entropy",
        lt,
        ENTROPY,
        "the responses become alike: lower --lr (now {lr}) or raise --beta (now {beta})",
        of_start=True,
    ),
    Rule(
        "length running away",
        "length",
        gt,
        LONGER,
        "a reward pays for words: read rollouts.jsonl, keep len among --rewards",
        of_start=True,
    ),
    Rule(
        "length falling away",
        "length",
        lt,
        SHORTER,
        "a reward pays for brevity: read rollouts.jsonl, keep len and format among --rewards",
        of_start=True,
    ),
    Rule(
        "KL exploding",
        "kl",
        gt,
        KL,
        "start again with a lower --lr (now {lr}) or a higher --beta (now {beta})",
    ),
    Rule(
        "everything truncated",
        "truncated",
        gt,
        CUT_OFF,
        "raise --max-new-tokens (now {max_new_tokens}); where text repeats itself, lower --lr",
    ),
    Rule(
        "sampler and scorer apart",
        "sampler_gap",
        gt,
        APART,
        "they compute different models: python -m rr1.certify --model {model}",
    ),
    Rule(
        "gradient not finite",
        "skipped",
        gt,
        0.0,
        "such a step is not taken: lower --lr (now {lr}), look for odd records in that step",
    ),
]


class Finding(NamedTuple):
    trouble: str
    line: int  # of metrics.jsonl
    evidence: str
    advice: str


def curve(rows: list[dict], metric: str) -> list[tuple[int, float]]:
    """(line, value) of the rows that have the metric."""
    return [(line, row[metric]) for line, row in enumerate(rows, 1) if metric in row]


def by_rule(rule: Rule, rows: list[dict]) -> Finding | None:
    """Shows the first step beyond the limit."""
    seen, limit = curve(rows, rule.metric), rule.limit
    if rule.of_start:
        start, seen = seen[:WINDOW], seen[WINDOW:]
        if len(seen) < WINDOW:
            return None
        limit *= mean(value for _, value in start)
    if not seen:
        return None
    now = mean(value for _, value in seen[-WINDOW:])
    if not rule.beyond(now, limit):
        return None
    line, value = next(pair for pair in seen if rule.beyond(pair[1], limit))
    evidence = (
        f"{rule.metric} {value:.3g}, mean of the last steps {now:.3g}, limit {limit:.3g}"
    )
    return Finding(rule.trouble, line, evidence, rule.advice)


def flat(rows: list[dict]) -> Finding | None:
    """The reward of the last third of the steps, against that of the first third."""
    seen = curve(rows, "reward")
    third = len(seen) // 3
    if third < WINDOW:
        return None
    first, last = ([value for _, value in part] for part in (seen[:third], seen[-third:]))
    rise = mean(last) - mean(first)
    error = math.hypot(stdev(first), stdev(last)) / math.sqrt(third)
    if rise > FLAT * error:
        return None
    return Finding(
        "reward flat",
        seen[-1][0],
        f"reward {mean(first):.3g} in the first third of the steps, {mean(last):.3g} in the last, "
        f"standard error {error:.2g}",
        "see zero_std and grad_norm; take more --prompts or steps, or a higher --lr (now {lr})",
    )


def silence(rows: list[dict], responses: list[tuple[int, float, bool]]) -> Finding | None:
    """Responses about damaged pictures that name nothing, and are paid no less than the others."""
    if not responses:
        return None
    newest = responses[-1][0]
    recent = [response for response in responses if response[0] > newest - WINDOW]
    silent = [(step, advantage) for step, advantage, is_silent in recent if is_silent]
    if len(silent) <= SILENT * len(recent):
        return None
    paid = mean(advantage for _, advantage in silent)
    if paid <= PAID:
        return None
    return Finding(
        "silence paid",
        next(
            (line for line, step in curve(rows, "step") if step == silent[-1][0]), len(rows)
        ),
        f"{len(silent)} of the last {len(recent)} responses in rollouts.jsonl name no damage, "
        f"their mean advantage is {paid:+.2f}",
        "fine-tune longer before this, or let a reward of your own charge less for a wrong name",
    )


def slowed(rows: list[dict]) -> Finding | None:
    """Shows the first slow step."""
    seconds = []
    for line, row in enumerate(rows, 1):
        spent = sum(value for name, value in row.items() if name.startswith("seconds"))
        if spent:
            seconds.append((line, spent))
    if not seconds:
        return None
    usual = median(value for _, value in seconds)
    slow = [(line, value) for line, value in seconds if value > SLOW * usual]
    if len(slow) < SLOW_STEPS:
        return None
    return Finding(
        "slowed by another process",
        slow[0][0],
        f"{slow[0][1]:.3g} s, the median step takes {usual:.3g} s; {len(slow)} such steps",
        "see what else runs (top, nvidia-smi); where length grew as well, it may be that alone",
    )


def numbers(row: Any) -> dict:
    """A row of metrics.jsonl, without what was not finite."""
    found = {name: float(value) for name, value in row.items() if value is not None}
    return found | {"step": int(found["step"])}


def response(row: Any) -> tuple[int, float, bool] | None:
    """(step, advantage, whether it names no damage); None where nothing is known to be damaged."""
    if not row["truth"] or not parse(row["truth"]).degradations:
        return None
    silent = not parse(row["response"]).degradations
    return int(row["step"]), float(row["advantage"]), silent


def read(path: Path, convert: Callable) -> list:
    """The lines of a file of JSON lines. ValueError names a line that is not what it should be."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found.append(convert(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            raise ValueError(
                f"{path}:{number}: a torn line, or none of a run: delete it"
            ) from None
    return found


def examine(folder: Path) -> list[str]:
    """What there is to say about a run, a line each. ValueError for what cannot be read."""
    metrics, config, rollouts = (
        folder / name for name in ("metrics.jsonl", "config.json", "rollouts.jsonl")
    )
    if not metrics.is_file():
        raise ValueError(
            f"{metrics} is not there: give the folder of a run that has made a step"
        )
    rows = read(metrics, numbers)
    if not rows:
        raise ValueError(f"{metrics} is empty: wait for the first step")
    options = defaultdict(lambda: "unknown")
    if config.is_file():
        try:
            options.update(json.loads(config.read_bytes()))
        except (ValueError, TypeError):
            raise ValueError(
                f"{config} is not a JSON object: delete or repair it"
            ) from None
    responses = read(rollouts, response) if rollouts.is_file() else []
    found = [
        flat(rows),
        *(by_rule(rule, rows) for rule in RULES),
        silence(rows, [known for known in responses if known]),
        slowed(rows),
    ]
    lines = []
    for trouble, line, evidence, advice in filter(None, found):
        where = f"step {rows[line - 1]['step']}, line {line} of metrics.jsonl"
        lines.append(f"{trouble} ({where}): {evidence}")
        lines.append(f"    {advice.format_map(options)}")
    return lines or [f"nothing found in {rows[-1]['step']} steps"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="its folder, such as runs/grpo")
    try:
        print("\n".join(examine(parser.parse_args(argv).run)))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
