"""Eq. 6-9: what a response is paid for.

A reward is a plain function `(response, record) -> float`, a user's own too:

    # my_rewards.py                                       --rewards deg len my_rewards.py:brevity
    def brevity(response, record):                        --reward-weights 1 1 0.2
        return -response.length / 100

`response` is a `Response`: the text, which also knows .length, .chain and .truncated. `record` is a dict: "chain" (the
true Chain), "length" (its tokens), "answer" (str or None), "question", "choices" (list or None), "image" (path, or a list of several), "id".
"""

import difflib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from degrade import Degradation
from rr1.answers import choice_index, plain
from rr1.chain import Chain, is_well_formed, parse

Instances = list[Degradation]
Reward = Callable[["Response", dict], float]


class Response(str):
    """A response's text that also knows its length in tokens (without the end-of-turn token), whether it was cut off
    before it ended its turn, and its parsed chain."""

    def __new__(cls, text: str, length: int, truncated: bool = False):
        response = super().__new__(cls, text)
        response.length, response.truncated = length, truncated
        return response

    @cached_property
    def chain(self) -> Chain:
        return parse(self)


# ---------------------------------------------------------------- Eq. 6


def r_deg(predicted: Instances, truth: Instances, reading: str = "matched") -> float:
    """Eq. 6: the reward for the right types at the right intensities; tau is the type and s the intensity.

    Both are lists of (type, intensity) as a Chain holds them. The paper's sum can be read in three ways:
        matched    the default, the intention: each instance counts once (`r_deg_matched`)
        pairwise   the equation to the letter (`r_deg_pairwise`)
        released   what the published code computes (`r_deg_released`)
    Nothing predicted where nothing is true is 0 in each. ValueError for another reading.
    """
    if reading not in READINGS:
        raise ValueError(f"unknown reading of Eq. 6 {reading!r}; there are {', '.join(READINGS)}")
    return READINGS[reading](predicted, truth)


def r_deg_matched(predicted: Instances, truth: Instances) -> float:
    """Eq. 6 over one-to-one matches of equal type: sum over matches of (1 - |s_d - s_GT|), less 1 for each instance
    left without a partner, predicted or true. Of all such matchings the best one counts. An instance whose intensity
    is outside [0, 1] has no partner."""
    total = 0.0
    for type in dict.fromkeys(tau for tau, _ in (*predicted, *truth)):  # not a set: its order varies between runs
        claims, facts = _intensities(predicted, type), _intensities(truth, type)
        pairs = min(len(claims), len(facts))
        total += pairs - _least_difference(claims, facts) - (len(claims) + len(facts) - 2 * pairs)
    outside = sum(not 0 <= s <= 1 for _, s in (*predicted, *truth))
    return total - outside


def r_deg_pairwise(predicted: Instances, truth: Instances) -> float:
    """Eq. 6 to the letter: sum over all pairs (i, j) of [tau_i = tau_j] (1 - |s_i - s_j|) - [tau_i != tau_j].

    Of J true types, k named rightly and none wrongly, it pays k (2 - J) less the intensity errors: about 0 for any
    answer at J = 2, and silence is best at J = 3. An intensity outside [0, 1] is taken as it is.
    """
    return sum(
        1.0 - abs(s_d - s_gt) if tau_d == tau_gt else -1.0
        for tau_d, s_d in predicted
        for tau_gt, s_gt in truth
    ) + 0.0  # fmt: skip


def r_deg_released(predicted: Instances, truth: Instances) -> float:
    """The published code's sum: every predicted instance of a true type earns 1 + (0.5 - |s_d - s_GT|), a repeated one
    again; every other predicted instance and every true type not named costs 1. Of a type that is true twice the last
    intensity counts. An intensity outside [0, 1] is taken as it is."""
    true_intensity = dict(truth)
    named = {tau for tau, _ in predicted}
    earned = sum(1.5 - abs(s - true_intensity[tau]) if tau in true_intensity else -1.0 for tau, s in predicted)
    return earned - float(sum(tau not in named for tau in true_intensity))


READINGS = {"matched": r_deg_matched, "pairwise": r_deg_pairwise, "released": r_deg_released}


def _intensities(instances: Instances, type: str) -> list[float]:
    return sorted(s for tau, s in instances if tau == type and 0 <= s <= 1)


def _least_difference(a: list[float], b: list[float]) -> float:
    """The least sum of |difference| over one-to-one pairs that use up the shorter list; both are sorted, so the best
    pairing keeps their order."""
    short, long = sorted((a, b), key=len)
    cost = [0.0] * (len(long) + 1)  # cost[j]: of pairing what has been seen of `short` within long[:j]
    for s in short:
        before, cost = cost, [math.inf]
        for j, t in enumerate(long):
            cost.append(min(cost[j], before[j] + abs(s - t)))
    return cost[-1]


# ---------------------------------------------------------------- Eq. 8 and the other terms


def r_len(length: int, truth_length: int) -> float:
    """Eq. 8: 1 - |len(Y) - len(Y_GT)| / len(Y_GT), in tokens of one tokenizer, end of turn not counted.

    1 for the true length, 0 for silence or for twice the length, and on down. ValueError for a true length below 1.
    """
    if truth_length < 1:
        raise ValueError(f"the true chain is {truth_length} tokens long, and Eq. 8 divides by it: it must be >= 1")
    return 1 - abs(length - truth_length) / truth_length


def accuracy(response: Response, record: dict) -> float:
    """1.0 if the ANSWER section gives the record's answer, else 0.0; case and punctuation do not matter.

    With choices, both may be an index, a letter, a choice's text, or label and text (`1`, `b`, `wagons`, `1. wagons`),
    tried in that order; without, the texts must be equal. A record or a response without an answer earns 0.0.
    """
    answer, truth = response.chain.answer, record.get("answer")
    if not answer or truth is None:
        return 0.0
    if choices := record.get("choices"):
        right = choice_index(truth, choices)
        if right is not None:
            return float(choice_index(answer, choices) == right)
    return float(plain(answer) == plain(truth))


REWARDS: dict[str, Reward] = {
    "deg": lambda response, record: r_deg_matched(response.chain.degradations, record["chain"].degradations),
    "deg_pairwise": lambda response, record: r_deg_pairwise(response.chain.degradations, record["chain"].degradations),
    "deg_released": lambda response, record: r_deg_released(response.chain.degradations, record["chain"].degradations),
    "len": lambda response, record: r_len(response.length, record["length"]),
    "format": lambda response, record: float(is_well_formed(response)),
    "accuracy": accuracy,
}


# ---------------------------------------------------------------- Eq. 9


def composite(
    response: Response, record: dict, rewards: dict[str, Reward], weights: Sequence[float] | None = None
) -> tuple[float, dict[str, float]]:
    """Eq. 9: R = r_deg + r_len, for any rewards: the sum of weight * reward -> (R, {name: its unweighted value}).

    `weights` in the order of `rewards`, default 1 each. A reward that raises (RuntimeError) or does not return a
    finite number (ValueError) is an error that names it and the record: a broken reward must not train a model.
    """
    weights = [1.0] * len(rewards) if weights is None else weights
    if len(weights) != len(rewards):
        raise ValueError(f"{len(weights)} weights for {len(rewards)} rewards ({', '.join(rewards)}): give one for each")
    values = {}
    for name, reward in rewards.items():
        where = f"reward {name!r} on record {record.get('id', record.get('image'))!r}"
        try:
            value = reward(response, record)
        except Exception as error:
            raise RuntimeError(f"{where} failed: {type(error).__name__}: {error}") from error
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{where} returned {value!r}; expected a finite number")
        values[name] = float(value)
    return float(sum(weight * value for weight, value in zip(weights, values.values()))), values


def load_rewards(names: Sequence[str]) -> dict[str, Reward]:
    """Rewards by name (a key of REWARDS) or as `file.py:function` -> {name as given: function}, in the order given.

    ValueError for a name that does not exist (saying what does), one given twice, or a function that does not take
    (response, record); FileNotFoundError for a file that is not there.
    """
    repeated = {name for name in names if list(names).count(name) > 1}
    if repeated:
        raise ValueError(f"rewards given more than once: {', '.join(sorted(repeated))}; use a weight instead")
    return {name: _from_file(name) if ":" in name else _from(REWARDS, name, "REWARDS") for name in names}


def _from(functions: dict[str, Reward], name: str, where: str) -> Reward:
    if name in functions:
        return functions[name]
    near = difflib.get_close_matches(name, functions, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no reward {name!r} in {where}; {hint}There are: {', '.join(functions) or 'none'}. "
                     "Your own goes as file.py:function")  # fmt: skip


def _from_file(name: str) -> Reward:
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"reward {name!r}: there is no file {file!r} (looked from {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(f"rewards_from_{path.stem}", path)
    if spec is None:
        raise ValueError(f"reward {name!r}: {file!r} is not a Python file (.py)")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    functions = {key: value for key, value in vars(module).items() if inspect.isfunction(value)}
    own = {key: value for key, value in functions.items() if value.__module__ == module.__name__}
    reward = functions.get(function) or _from(own, function, file)  # an imported one may be used, but is no suggestion
    try:
        inspect.signature(reward).bind("response", "record")
    except TypeError as error:
        raise ValueError(f"reward {name!r} must be a function of (response, record): {error}") from None
    return reward
