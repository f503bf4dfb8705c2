"""Eq. 6-9: rewards, by hand-made cases and against slow literal writings of the equations."""

import copy
import math
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rr1.answers import choice_index
from rr1.chain import Chain, render
from rr1.rewards import (
    READINGS,
    REWARDS,
    Response,
    accuracy,
    composite,
    load_rewards,
    match_types,
    r_deg,
    r_len,
)

STEADY = dict(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TRUTH = [("lens blur", 0.5), ("noise", 0.2)]
CHAIN = Chain(TRUTH, "soft edges", "four cars in a row", "they are trucks", "0")
RECORD = {
    "id": "photo-7", "chain": CHAIN, "degradations": CHAIN.degradations, "length": 40,
    "answer": "0", "question": "What are these?",
    "choices": ["trucks", "wagons", "jeeps", "cars"], "image": "photo-7.jpg",
}  # fmt: skip


def response(chain=CHAIN, length=40, **changed):
    parts = {
        "degradations": chain.degradations,
        "influence": "i",
        "reasoning": "r",
        "conclusion": "c",
        "answer": "0",
    }
    return Response(render(Chain(**{**parts, **changed})), length)


# ---------------------------------------------------------------- a response


def test_a_response_is_a_text_that_knows_more():
    r = Response(render(CHAIN), 40, truncated=True)
    assert (
        isinstance(r, str) and r == render(CHAIN) and (r.length, r.truncated) == (40, True)
    )
    assert r.chain == CHAIN and r.chain is r.chain  # parsed once
    assert Response("words", 1).truncated is False


def test_a_response_can_be_copied_and_pickled():
    r = Response(render(CHAIN), 40, truncated=True)
    for again in (copy.copy(r), copy.deepcopy(r), pickle.loads(pickle.dumps(r))):
        assert again == r and type(again) is Response
        assert (again.length, again.truncated, again.chain) == (40, True, CHAIN)


# ---------------------------------------------------------------- Eq. 6, matched


@pytest.mark.parametrize("predicted, truth, expected", [
    ([], [], 0),
    (TRUTH, TRUTH, 2),  # perfect: one for each
    (TRUTH[::-1], TRUTH, 2),                                                    # in any order
    ([], TRUTH, -2),                                                            # silence
    (TRUTH, [], -2),                                                            # invention
    ([("noise", 0.2)], TRUTH, 1 - 1),  # one right, one missed
    ([("noise", 0.5), ("lens blur", 0.4)], TRUTH, 0.7 + 0.9),  # right types, wrong intensities
    ([("lens blur", 0.5), ("darkness", 0.2)], TRUTH, 1 - 1 - 1),  # confused: costs on both sides
    ([("noise", 0.2), ("noise", 0.2), ("lens blur", 0.5)], TRUTH, 1 - 1 + 1),  # a repeated one
    ([("noise", 0.9), ("noise", 0.3), ("lens blur", 0.5)], TRUTH, 0.9 - 1 + 1), # the better one
    ([("noise", 0.3), ("noise", 0.9)], [("noise", 0.8), ("noise", 0.2)], 1.8),  # two of a type
    ([("noise", 1.2), ("lens blur", 0.5)], TRUTH, -1 - 1 + 1),  # out of range: no partner
    ([("noise", -0.1)], [], -1),
    ([("noise", 5.0)], [("noise", 1.0)], -2),
])  # fmt: skip
def test_r_deg_matched_by_hand(predicted, truth, expected):
    assert r_deg(predicted, truth) == pytest.approx(expected, abs=1e-12)


def test_the_values_of_figure_2():
    # Four instances are predicted; Figure 2 shows 0.76, -1, 0.48 and 0.99 beside them.
    predicted = [
        ("lens blur", 0.60),
        ("saturation", 0.30),
        ("darkness", 0.10),
        ("noise", 0.41),
    ]
    truth = [("lens blur", 0.36), ("darkness", 0.62), ("noise", 0.42)]
    assert r_deg(predicted, truth) == pytest.approx(0.76 - 1 + 0.48 + 0.99)
    assert r_deg(predicted, [*truth, ("scan lines", 0.5)]) == pytest.approx(
        0.76 - 1 + 0.48 + 0.99 - 1
    )


types = st.sampled_from(["noise", "lens blur", "darkness"])
instances = st.lists(
    st.tuples(types, st.sampled_from([-0.5, 0.0, 0.1, 0.35, 0.5, 0.8, 1.0, 1.5])),
    max_size=4,
)


def best_of_all_matchings(predicted, truth):
    """Eq. 6 `matched` by trying everything: the first instance alone, or with each partner."""
    if not predicted:
        return -len(truth)
    (tau, s), *rest = predicted
    values = [best_of_all_matchings(rest, truth) - 1]
    for j, (tau_gt, s_gt) in enumerate(truth):
        if tau == tau_gt and 0 <= s <= 1 and 0 <= s_gt <= 1:
            values.append(
                1 - abs(s - s_gt) + best_of_all_matchings(rest, truth[:j] + truth[j + 1 :])
            )
    return max(values)


@settings(max_examples=300, **STEADY)
@given(instances, instances)
def test_r_deg_matched_is_the_best_of_all_matchings(predicted, truth):
    value = r_deg(predicted, truth)
    assert value == pytest.approx(best_of_all_matchings(predicted, truth), abs=1e-12)
    assert value == pytest.approx(r_deg(predicted[::-1], truth[::-1]), abs=1e-12)
    assert -(len(predicted) + len(truth)) <= value <= len(truth)


@settings(max_examples=200, **STEADY)
@given(instances, instances)
def test_match_types_counts_the_pairs_and_sums_their_differences(predicted, truth):
    pairs, difference = match_types(predicted, truth)
    expected = 0
    for tau in ("noise", "lens blur", "darkness"):
        counts = [
            sum(t == tau and 0 <= s <= 1 for t, s in side) for side in (predicted, truth)
        ]
        expected += min(counts)
    unmatched = len(predicted) + len(truth) - 2 * pairs
    assert pairs == expected and 0 <= difference <= pairs
    assert r_deg(predicted, truth) == pytest.approx(
        pairs - difference - unmatched, abs=1e-12
    )


def test_match_types_by_hand():
    predicted = [("noise", 0.3), ("noise", 0.9), ("darkness", 0.5), ("lens blur", 2.0)]
    truth = [("noise", 0.8), ("lens blur", 0.5), ("noise", 0.2)]
    assert match_types(predicted, truth) == (2, pytest.approx(0.2))
    assert match_types([], truth) == (0, 0) == match_types(predicted, [])


# ---------------------------------------------------------------- Eq. 6, the other readings


@pytest.mark.parametrize("J", [1, 2, 3, 4])
def test_what_the_literal_sum_pays(J):
    truth = [(f"type {j}", 0.5) for j in range(J)]
    errors = [0.1, 0.2, 0.05, 0.3]
    for k in range(J + 1):
        predicted = [(tau, s + error) for (tau, s), error in zip(truth[:k], errors)]
        assert r_deg(predicted, truth, "pairwise") == pytest.approx(
            k * (2 - J) - sum(errors[:k]), abs=1e-12
        )
        assert r_deg(predicted, truth) == pytest.approx(
            k - sum(errors[:k]) - (J - k), abs=1e-12
        )
        one_wrong = r_deg([*predicted, ("another", 0.5)], truth, "pairwise")
        assert one_wrong == pytest.approx(r_deg(predicted, truth, "pairwise") - J)
    perfect, silence = r_deg(truth, truth, "pairwise"), r_deg([], truth, "pairwise")
    assert (perfect > silence) == (J == 1)
    assert (perfect == silence) == (J == 2)
    assert (perfect < silence) == (J >= 3)
    assert r_deg(truth, truth) > r_deg([], truth)


@settings(max_examples=100, **STEADY)
@given(instances, instances)
def test_pairwise_is_the_double_sum(predicted, truth):
    total = 0.0
    for tau, s in predicted:
        for tau_gt, s_gt in truth:
            total += (tau == tau_gt) * (1 - min(1, abs(s - s_gt))) - (tau != tau_gt)
    assert r_deg(predicted, truth, "pairwise") == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("predicted, truth, expected", [
    ([], [], 0),
    (TRUTH, TRUTH, 1.5 + 1.5),
    ([], TRUTH, -1 - 1),
    (TRUTH, [], -1 - 1),
    ([("noise", 0.5)], TRUTH, 1 + (0.5 - 0.3) - 1),
    ([("lens blur", 0.5), ("darkness", 0.2)], TRUTH, 1.5 - 1 - 1),
    ([("noise", 0.2), ("noise", 0.3)], TRUTH, 1.5 + 1.4 - 1),  # the repeated type is paid twice
    ([("noise", 0.2)] * 9, [("noise", 0.2)], 9 * 1.5),                          # ... or nine times
    ([("darkness", 0.2), ("darkness", 0.3)], [], -1 - 1),
    ([("noise", 0.2)], [("noise", 0.9), ("noise", 0.4)], 1.5 - 0.2),  # the last one true
])  # fmt: skip
def test_r_deg_released_by_hand(predicted, truth, expected):
    assert r_deg(predicted, truth, "released") == pytest.approx(expected, abs=1e-12)


def test_nothing_predicted_and_nothing_true_is_0():
    for reading in READINGS:
        value = r_deg([], [], reading)
        assert value == 0 and isinstance(value, float)


def test_an_unknown_reading_says_which_there_are():
    with pytest.raises(ValueError, match="'match'.*matched, pairwise, released"):
        r_deg([], [], "match")


@pytest.mark.parametrize("reading", READINGS)
def test_no_number_that_a_policy_writes_ends_a_run(reading):
    """1e39 is a finite float and no float32: a difference counts at most 1."""
    for number in ("9" * 40, "-" + "9" * 39, "47"):
        y = Response(f"<TYPE>noise({number})<TYPE_END>", 9)
        name = "deg" if reading == "matched" else f"deg_{reading}"
        total, _ = composite(
            y, RECORD | {"degradations": [("noise", 0.2)]}, load_rewards([name])
        )
        assert total == {"matched": -2, "pairwise": 0, "released": 0.5}[reading]


# ---------------------------------------------------------------- Eq. 8, format, accuracy


@pytest.mark.parametrize("length, truth, expected", [
    (40, 40, 1), (20, 40, 0.5), (60, 40, 0.5), (0, 40, 0), (80, 40, 0), (120, 40, -1),
    (41, 40, 1 - 1 / 40),
])  # fmt: skip
def test_r_len_by_hand(length, truth, expected):
    assert r_len(length, truth) == pytest.approx(expected, abs=1e-12)


def test_r_len_needs_a_true_length():
    with pytest.raises(ValueError, match="0 tokens"):
        r_len(10, 0)


def test_format():
    good = response()
    assert REWARDS["format"](good, RECORD) == 1.0
    assert REWARDS["format"](Response(good + " and so on", 44), RECORD) == 0.0
    assert REWARDS["format"](response(degradations=[("noise", 1.5)]), RECORD) == 0.0
    assert REWARDS["format"](Response(good[:60], 20, truncated=True), RECORD) == 0.0


@pytest.mark.parametrize("truth", ["1", 1, "B", "b", "wagons"])
@pytest.mark.parametrize("answer, right", [
    ("1", 1), ("B", 1), ("b", 1), ("(B)", 1), ("b.", 1), ("wagons", 1), ("Wagons.", 1),
    ("1. wagons", 1), ("B) Wagons", 1), ("0", 0), ("A", 0), ("trucks", 0), ("4", 0), ("E", 0),
    ("", 0), ("wagon", 0), ("1 2", 0),
    ("0. wagons", 0), (None, 0),
])  # fmt: skip
def test_accuracy_of_a_choice(truth, answer, right):
    assert accuracy(response(answer=answer), {**RECORD, "answer": truth}) == right


def test_choices_that_look_like_labels_are_read_alike_on_both_sides():
    record = {
        **RECORD,
        "choices": ["3", "2", "1", "7"],
        "answer": "2",
    }  # index 2, as index goes before text
    assert (
        accuracy(response(answer="2"), record) == 1
        and accuracy(response(answer="C"), record) == 1
    )
    assert (
        accuracy(response(answer="1"), record) == 0
    )  # index 1, although the right choice's text is "1"
    assert choice_index("7", record["choices"]) == 3


def test_accuracy_of_an_open_question():
    record = {**RECORD, "choices": None, "answer": "A Knife"}
    assert accuracy(response(answer=" a knife. "), record) == 1
    assert accuracy(response(answer="knives"), record) == 0
    assert accuracy(response(answer=None), record) == 0


def test_accuracy_where_there_is_nothing_to_compare():
    assert accuracy(response(), {**RECORD, "answer": None}) == 0
    assert (
        accuracy(response(answer="vans"), {**RECORD, "answer": "vans"}) == 1
    )  # not among the choices: equal texts
    assert accuracy(response(answer="lorries"), {**RECORD, "answer": "vans"}) == 0


# ---------------------------------------------------------------- Eq. 9 and users' own rewards


def test_eq_9_is_the_weighted_sum():
    r = response(degradations=[("noise", 0.5)], length=30)
    total, values = composite(r, RECORD, load_rewards(["deg", "len"]))
    assert values == {"deg": pytest.approx(0.7 - 1), "len": pytest.approx(0.75)} and list(
        values
    ) == ["deg", "len"]
    assert total == pytest.approx(0.7 - 1 + 0.75)
    total, again = composite(r, RECORD, load_rewards(["deg", "len"]), [2, 0.2])
    assert total == pytest.approx(2 * (0.7 - 1) + 0.2 * 0.75) and again == values
    assert composite(r, RECORD, {}) == (0.0, {})


def test_every_reward_pays_a_perfect_response_the_most():
    perfect = {
        "deg": 2,
        "deg_pairwise": 0,
        "deg_released": 3,
        "len": 1,
        "format": 1,
        "accuracy": 1,
    }
    assert composite(response(), RECORD, REWARDS)[1] == pytest.approx(perfect)
    silent = composite(Response("", 0), RECORD, REWARDS)[1]
    assert silent == {
        "deg": -2,
        "deg_pairwise": 0,
        "deg_released": -2,
        "len": 0,
        "format": 0,
        "accuracy": 0,
    }


def test_weights_must_fit_the_rewards():
    with pytest.raises(ValueError, match="1 weights for 2 rewards"):
        composite(response(), RECORD, load_rewards(["deg", "len"]), [1.0])


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Scale:\n"
        "    by: 'int' = 100\n"
        "def brevity(response, record):\n"
        "    return -response.length / Scale().by\n"
        "def same_types(response, record):\n"
        "    said, true = response.chain.degradations, record['degradations']\n"
        "    return {d.type for d in said} == {d.type for d in true}\n"
        "def knows_the_record(response, record):\n"
        "    return len(record['question']) + len(record['image']) + int(record['answer'])\n"
        "def broken(response, record):\n"
        "    return record['colour']\n"
        "def endless(response, record):\n"
        "    return float('nan')\n"
        "def wordy(response, record):\n"
        "    return 'good'\n"
        "def forgetful(response, record):\n"
        "    pass\n"
        "def one_argument(response):\n"
        "    return 0.0\n"
    )
    return path


def test_a_users_own_reward(own):
    names = ["deg", "len", f"{own}:brevity", f"{own}:same_types", f"{own}:knows_the_record"]
    rewards = load_rewards(names)
    assert list(rewards) == names
    total, values = composite(response(), RECORD, rewards, [1, 1, 0.2, 1, 0])
    assert (
        values[f"{own}:brevity"] == pytest.approx(-0.4)
        and values[f"{own}:same_types"] == 1.0
    )
    assert values[f"{own}:knows_the_record"] == len("What are these?") + len("photo-7.jpg")
    assert total == pytest.approx(2 + 1 - 0.08 + 1)


def test_a_path_relative_to_the_working_directory(own, monkeypatch):
    monkeypatch.chdir(own.parent)
    assert composite(response(), RECORD, load_rewards(["my_rewards.py:brevity"]))[
        0
    ] == pytest.approx(-0.4)


def test_a_typo_says_what_exists(own):
    with pytest.raises(
        ValueError, match="'dge'.*there are: deg, .*deg_released, len, format, accuracy"
    ):
        load_rewards(["dge"])
    with pytest.raises(
        ValueError, match="'brevty' in .*my_rewards.py; there are: brevity, broken"
    ):
        load_rewards([f"{own}:brevty"])
    with pytest.raises(FileNotFoundError, match="my_reward.py"):
        load_rewards([f"{own.parent / 'my_reward.py'}:brevity"])
    with pytest.raises(ValueError, match=r"\(response, record\)"):
        load_rewards([f"{own}:one_argument"])
    with pytest.raises(ValueError, match="more than once: deg len deg"):
        load_rewards(["deg", "len", "deg"])
    (own.parent / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="not a Python file"):
        load_rewards([f"{own.parent / 'notes.txt'}:brevity"])


def test_a_reward_that_fails_is_named_with_its_record(own):
    with pytest.raises(
        RuntimeError, match="broken' on record 'photo-7' failed: KeyError: 'colour'"
    ) as error:
        composite(response(), RECORD, load_rewards([f"{own}:broken"]))
    assert isinstance(error.value.__cause__, KeyError)  # the user's own traceback is kept
    for name, came in [("endless", "nan"), ("wordy", "'good'"), ("forgetful", "None")]:
        with pytest.raises(
            ValueError, match=f"{name}' on record 'photo-7' returned {came}"
        ):
            composite(response(), RECORD, load_rewards([f"{own}:{name}"]))


def test_numpy_numbers_are_numbers():
    rewards = {
        "f32": lambda r, record: np.float32(0.5),
        "i64": lambda r, record: np.int64(2),
    }
    total, values = composite(response(), RECORD, rewards)
    assert total == 2.5 and all(type(value) is float for value in values.values())
    with pytest.raises(ValueError, match="inf"):
        composite(response(), RECORD, {"inf": lambda r, record: np.float64(math.inf)})


def test_what_float32_cannot_hold_is_named():
    for value in (1e39, -1e39, 10**400):
        with pytest.raises(ValueError, match="'big' on record 'photo-7' returned"):
            composite(response(), RECORD, {"big": lambda r, record: value})
    fine = {"a": lambda r, record: 3e38, "b": lambda r, record: 3e38}
    with pytest.raises(
        ValueError, match="record 'photo-7' sum to 6e[+]38; see --reward-weights"
    ):
        composite(response(), RECORD, fine)
    with pytest.raises(ValueError, match="sum to nan; see --reward-weights"):
        composite(response(), RECORD, load_rewards(["deg"]), [math.nan])
    assert composite(response(), RECORD, fine, [1, -1])[0] == 0


def test_rewards_read_the_records_damage_and_not_its_chain():
    """A record for reinforcement learning may have no chain."""
    record = RECORD | {"chain": Chain(), "response": None, "degradations": [("noise", 0.2)]}
    paid = composite(response(degradations=[("noise", 0.3)]), record, REWARDS)[1]
    assert paid["deg"] == pytest.approx(0.9) and paid["deg_released"] == pytest.approx(1.4)
