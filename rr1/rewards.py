"""Eq. 6-9: what a response is paid for.

A reward is a plain function `(response, record) -> float`, a user's own too:

    # my_rewards.py                                       --rewards deg len my_rewards.py:brevity
    def brevity(response, record):                        --reward-weights 1 1 0.2
        return -response.length / 100

`response` is a `Response`: the text, which also knows .length, .chain and .truncated. `record` is a
dict: "degradations" (the true types and intensities), "length" (the tokens to aim for: those of
the true chain, or what the record itself says, by Eq. 7), "answer" (str or None), "question",
"choices" (list or None), "image" (path, or a list of several), "id", "response" and "chain" (the
true chain as text, None where there is none, and parsed).
"""

import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from degrade import Degradation
from rr1.answers import is_right
from rr1.chain import Chain, is_well_formed, parse

LARGEST = 3.4028234e38  # of float32, in which advantages are computed
Instances = list[Degradation]
Reward = Callable[["Response", dict], float]


class Response(str):
    """A response's text that also knows its length in tokens (without the end-of-turn token),
    whether it was cut off before it ended its turn, and its parsed chain."""

    def __new__(cls, text: str, length: int, truncated: bool = False):
        response = super().__new__(cls, text)
        response.length, response.truncated = length, truncated
        return response

    def __getnewargs__(self):  # for copy and pickle
        return str(self), self.length, self.truncated

    @cached_property
    def chain(self) -> Chain:
        return parse(self)


# ---------------------------------------------------------------- Eq. 6


def r_deg_matched(predicted: Instances, truth: Instances) -> float:
    """Eq. 6 as it is meant: sum over one-to-one matches of equal type tau of (1 - |s_d - s_GT|),
    minus 1 for each instance without a partner, predicted or true.

    Of all such matchings the best one counts. An intensity s outside [0, 1] has no partner.
    """
    pairs, difference = match_types(predicted, truth)
    unmatched = len(predicted) + len(truth) - 2 * pairs
    return pairs - difference - unmatched


def match_types(predicted: Instances, truth: Instances) -> tuple[int, float]:
    """The best one-to-one matching by type -> (number of pairs, their summed |s_d - s_GT|)."""
    pairs, difference = 0, 0.0
    for tau in dict(truth):  # each type once
        s_d, s_gt = _intensities(predicted, tau), _intensities(truth, tau)
        pairs += min(len(s_d), len(s_gt))
        difference += _least_difference(s_d, s_gt)
    return pairs, difference


def _intensities(instances: Instances, type: str) -> list[float]:
    return sorted(s for tau, s in instances if tau == type and 0 <= s <= 1)


def _least_difference(a: list[float], b: list[float]) -> float:
    """The least sum of |difference| over one-to-one pairs that use up the shorter list.

    Both are sorted, and the best pairing keeps their order. Most lists have one element; a type
    that occurs several times takes len(a) * len(b) steps.
    """
    short, long = sorted((a, b), key=len)
    # cost[j]: of pairing what has been seen of `short` with long[:j]
    cost = [0.0] * (len(long) + 1)
    for s in short:
        before, cost = cost, [math.inf]
        for j, t in enumerate(long):
            cost.append(min(cost[j], before[j] + abs(s - t)))
    return cost[-1]


# ---------------------------------------------------------------- Eq. 6, other readings


def r_deg_pairwise(predicted: Instances, truth: Instances) -> float:
    """Eq. 6 to the letter: the sum over all pairs (i, j) of 1 - |s_i - s_j| where tau_i = tau_j,
    and of -1 where not.

    Of J true types, k named rightly and w wrongly, it pays k (2 - J) - w J minus the intensity
    errors. At J = 2 a right name earns nothing, a wrong one costs 2, and silence earns as much as
    the perfect answer; from J = 3 on every name costs, and silence is best. A difference counts at
    most 1, however large a number the policy writes.
    """
    total = 0.0
    for tau_d, s_d in predicted:
        for tau_gt, s_gt in truth:
            total += 1 - min(1, abs(s_d - s_gt)) if tau_d == tau_gt else -1
    return total


def r_deg_released(predicted: Instances, truth: Instances) -> float:
    """The published code's sum: each predicted instance of a true type, a repeated one too, earns
    1 + (0.5 - |s_d - s_GT|); every other predicted instance and every true type not named costs 1.

    Of a type that is true twice the last intensity counts. A difference counts at most 1.
    """
    true_intensity = dict(truth)
    total = 0.0
    for tau, s_d in predicted:
        s_gt = true_intensity.get(tau)
        total += -1 if s_gt is None else 1.5 - min(1, abs(s_d - s_gt))
    missed = true_intensity.keys() - dict(predicted).keys()
    return total - len(missed)


READINGS = {
    "matched": r_deg_matched,
    "pairwise": r_deg_pairwise,
    "released": r_deg_released,
}


def r_deg(predicted: Instances, truth: Instances, reading: str = "matched") -> float:
    """Eq. 6: the reward for the right types tau at the right intensities s.

    Both are lists of (type, intensity) as a Chain holds them. Nothing predicted where nothing is
    true is 0 in each reading (a key of READINGS). ValueError for another one.
    """
    if reading not in READINGS:
        raise ValueError(
            f"unknown reading of Eq. 6 {reading!r}; there are {', '.join(READINGS)}"
        )
    return READINGS[reading](predicted, truth)


# ---------------------------------------------------------------- Eq. 8 and the other terms


def r_len(length: int, truth_length: int) -> float:
    """Eq. 8: 1 - |len(Y) - len(Y_GT)| / len(Y_GT), in tokens, the end of turn not counted.

    1 for the true length, 0 for silence or for twice the length, and on down. ValueError for a true
    length below 1.
    """
    if truth_length < 1:
        raise ValueError(
            f"the true length is {truth_length} tokens; Eq. 8 divides by it: expected >= 1"
        )
    return 1 - abs(length - truth_length) / truth_length


def accuracy(response: Response, record: dict) -> float:
    """1.0 if the ANSWER section gives the record's answer, whatever its case and punctuation.

    With choices, both may be an index, a letter, a choice's text, or label and text (`1`, `b`,
    `wagons`, `1. wagons`), tried in that order; without, the texts must be equal. Everything
    else, a record without an answer too, earns 0.0.
    """
    answer = response.chain.answer
    truth = record.get("answer")
    if not answer or truth is None:
        return 0.0
    right, _ = is_right(answer, truth, record.get("choices"))
    return float(right)


def _deg(reading):
    def deg(response, record):
        return reading(response.chain.degradations, record["degradations"])

    return deg


def _len(response, record):
    return r_len(response.length, record["length"])


def _format(response, record):
    return float(is_well_formed(response))


REWARDS: dict[str, Reward] = {
    "deg": _deg(r_deg_matched),
    "deg_pairwise": _deg(r_deg_pairwise),
    "deg_released": _deg(r_deg_released),
    "len": _len,
    "format": _format,
    "accuracy": accuracy,
}


# ---------------------------------------------------------------- Eq. 9


def composite(
    response: Response,
    record: dict,
    rewards: dict[str, Reward],
    weights: Sequence[float] = (),
) -> tuple[float, dict[str, float]]:
    """Eq. 9: R = r_deg + r_len, for any rewards: sum of weight * reward -> (R, {name: its value}).

    `weights` in the order of `rewards`, default 1 each. A broken reward must not train a model: one
    that raises (RuntimeError), or that is no number or outside float32's range (ValueError), is an
    error that names it and the record; a sum outside that range is one, too.
    """
    weights = weights or [1.0] * len(rewards)
    if len(weights) != len(rewards):
        raise ValueError(
            f"{len(weights)} weights for {len(rewards)} rewards: give one for each"
        )
    values = {}
    for name, reward in rewards.items():
        where = f"reward {name!r} on record {record.get('id')!r}"
        try:
            value = reward(response, record)
        except Exception as error:
            raise RuntimeError(
                f"{where} failed: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(value, numbers.Real) or not abs(value) <= LARGEST:
            raise ValueError(f"{where} returned {value!r}; expected a finite number")
        values[name] = float(value)
    total = sum(weight * value for weight, value in zip(weights, values.values()))
    if not abs(total) <= LARGEST:
        where = f"record {record.get('id')!r}"
        raise ValueError(
            f"the rewards of {where} sum to {total}; see --reward-weights {weights}"
        )
    return float(total), values


def load_rewards(names: Sequence[str]) -> dict[str, Reward]:
    """Rewards by name (a key of REWARDS) or as `file.py:function` -> {name as given: function}.

    ValueError for a name that does not exist (saying what does), one given twice, or a function
    that does not take (response, record); FileNotFoundError for a file that is not there.
    """
    if len(set(names)) < len(names):
        raise ValueError(
            f"a reward is given more than once: {' '.join(names)}; use a weight instead"
        )
    return {name: _load(name) for name in names}


def _load(name: str) -> Reward:
    file, _, function = name.rpartition(":")
    known = _functions_of(file) if file else REWARDS
    if function not in known:
        raise ValueError(
            f"no reward {function!r} in {file or 'REWARDS'}; there are: {', '.join(known)}. "
            "Your own goes as file.py:function"
        )
    reward = known[function]
    try:
        inspect.signature(reward).bind("response", "record")
    except TypeError as error:
        raise ValueError(
            f"{name!r} must be a function of (response, record): {error}"
        ) from None
    return reward


def _functions_of(file: str) -> dict[str, Reward]:
    """The functions that a Python file defines, by name."""
    spec = importlib.util.spec_from_file_location(f"rewards_from_{Path(file).stem}", file)
    if spec is None:
        raise ValueError(f"{file!r} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    functions = inspect.getmembers(module, inspect.isfunction)
    return {name: f for name, f in functions if f.__module__ == spec.name}
