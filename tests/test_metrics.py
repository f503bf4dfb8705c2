"""What `evaluate.py` reports, against numbers worked out by hand."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from degrade import Degradation
from rr1.chain import Chain, render
from rr1.evaluation import figure_6, figures, metrics, report, scores, statistics
from rr1.evaluation.statistics import cell, markdown
from rr1.rewards import r_deg

CHOICES = ["red", "green", "blue", "white"]
BLUR, NOISE, DARK, GRAFFITI = "lens blur", "noise", "darkness", "graffiti"


def D(*pairs):
    return [Degradation(*pair) for pair in pairs]


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (0, 10, 0.0, 0.27753),
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72247, 1.0),
        (81, 263, 0.25529, 0.36618),
        (1, 29, 0.00611, 0.17176),
    ],
)
def test_wilson_known_values(right, n, low, high):
    """The last two are the examples of Newcombe (1998), table I, method 3."""
    e = statistics.wilson(right, n)
    assert e.value == right / n and e.n == n
    assert e.low == pytest.approx(low, abs=1e-4) and e.high == pytest.approx(high, abs=1e-4)


def test_no_observations_give_no_number():
    for e in (
        statistics.wilson(0, 0),
        statistics.bootstrap([]),
        statistics.bootstrap([0, 0], [0, 0]),
        statistics.bootstrap_cells([[], []]),
    ):
        assert e == (None, None, None, 0)


def test_bootstrap_of_a_constant_is_that_constant():
    assert statistics.bootstrap([0.25] * 7) == (0.25, 0.25, 0.25, 7)
    assert statistics.bootstrap([1, 2, 3], [2, 4, 6]) == (
        0.5,
        0.5,
        0.5,
        3,
    )  # a ratio that is the same in every record
    assert statistics.bootstrap_cells([[0.5] * 3, [1.0] * 9, []]) == (0.75, 0.75, 0.75, 12)


def test_bootstrap_of_a_mean_has_the_normal_width():
    values = np.random.default_rng(0).normal(2, 1, 900)
    e = statistics.bootstrap(values)
    half = 1.96 * values.std() / 30
    assert e.value == pytest.approx(values.mean())
    assert e.low == pytest.approx(e.value - half, abs=0.008) and e.high == pytest.approx(
        e.value + half, abs=0.008
    )
    assert statistics.bootstrap(values) == e


def test_bootstrap_cells_weighs_cells_alike():
    """Cells of 100 and 400 zeros and ones: the variance is (p q / 100 + p q / 400) / 4."""
    cells = [[0, 1] * 50, [0, 1] * 200]
    e = statistics.bootstrap_cells(cells)
    half = 1.96 * math.sqrt(0.25 / 100 + 0.25 / 400) / 2
    assert e.value == 0.5 and e.high - e.low == pytest.approx(2 * half, rel=0.08)


def test_paired_difference():
    before = np.random.default_rng(0).normal(size=300)
    e = statistics.paired_difference(before + 0.5, before)
    assert e.n == 300 and e[:3] == pytest.approx(
        (0.5, 0.5, 0.5)
    )  # what is common to both falls out
    shuffled = statistics.paired_difference(
        np.random.default_rng(1).permutation(before) + 0.5, before
    )
    assert shuffled.high - shuffled.low > 0.2
    assert statistics.paired_difference([1, 0, 2], [1, 0, 2])[:3] == (0, 0, 0)
    with pytest.raises(ValueError, match="2 records after and 3 before"):
        statistics.paired_difference([1, 2], [1, 2, 3])


@pytest.mark.parametrize(
    "gained, lost, p",
    [
        (0, 0, 1),
        (2, 0, 0.5),
        (0, 5, 2 / 32),
        (10, 2, 2 * (1 + 12 + 66) / 2**12),
        (11, 9, 0.8238),
        (3000, 2000, 0),
    ],
)
def test_mcnemar_known_values(gained, lost, p):
    assert (
        statistics.mcnemar(gained, lost)
        == statistics.mcnemar(lost, gained)
        == pytest.approx(p, abs=5e-5)
    )


# ---------------------------------------------------------------- one prediction


def test_caption_f1_by_hand():
    true = "a red star top left, a blue ring top right on sand"
    assert scores.caption_phrases(true) == Counter(
        ["a red star top left", "a blue ring top right", "on sand"]
    )
    assert scores.caption_f1(true, true) == 1
    assert (
        scores.caption_f1("A blue ring top right, a red star  top left on SAND.", true) == 1
    )  # order, case, marks do not count
    assert scores.caption_f1("a red star top left on sand", true) == pytest.approx(
        2 * 2 / (2 + 3)
    )
    assert scores.caption_f1(
        "a red star top left, a red star top left on sand", true
    ) == pytest.approx(2 * 2 / (3 + 3))
    assert scores.caption_f1(
        "a red star top left, a blue ring top right on grass", true
    ) == pytest.approx(2 / 3)
    assert scores.caption_f1("nothing", true) == 0 == scores.caption_f1("", "")


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("2", (1, True)),
        ("c", (1, True)),
        ("Blue.", (1, True)),
        ("2. blue", (1, True)),
        ("1", (0, True)),
        ("white", (0, True)),
        ("4", (0, False)),
        ("purple", (0, False)),
        ("red or blue", (0, False)),
        ("", (0, False)),
        (None, (0, False)),
    ],
)
def test_a_choice_by_index_letter_or_text_and_never_guessed(answer, expected):
    assert scores.score_answer(answer, "choice", "2", CHOICES) == expected


def test_open_answers():
    assert scores.score_answer(" Top left. ", "open", "top left", None) == (1, True)
    assert scores.score_answer("left", "open", "top left", None) == (0, True)
    assert scores.score_answer(None, "open", "top left", None) == (0, False)


@pytest.mark.parametrize(
    "said, true, matched, error",
    [
        (D((NOISE, 0.3)), D((NOISE, 0.5)), 1, 0.2),
        (D((NOISE, 0.3), (BLUR, 0.9)), D((NOISE, 0.5), (DARK, 0.1)), 1, 0.2),
        (
            D((NOISE, 0.3), (NOISE, 0.6)),
            D((NOISE, 0.5)),
            1,
            0.1,
        ),  # a type named twice matches once, at its best
        (D((NOISE, 0.9), (NOISE, 0.2)), D((NOISE, 0.1), (NOISE, 0.7)), 2, 0.3),
        (D((NOISE, 1.4)), D((NOISE, 1.0)), 0, 0),  # no intensity: no match, as in Eq. 6
        (D(), D((NOISE, 0.5)), 0, 0),
        (D((NOISE, 0.5)), D(), 0, 0),
        (D(), D(), 0, 0),
    ],
)
def test_count_types(said, true, matched, error):
    c = metrics.count_types(said, true)
    assert c == {
        "named": len(said),
        "true": len(true),
        "matched": matched,
        "error": pytest.approx(error),
    }
    assert r_deg(said, true) == pytest.approx(
        c["matched"] - c["error"] - (c["named"] - c["matched"]) - (c["true"] - c["matched"])
    )


# ---------------------------------------------------------------- many


def row(
    said,
    true,
    answer="0",
    truth="0",
    form="choice",
    shown="as is",
    plain=False,
    length=50,
    truth_length=40,
    **more,
):
    caption = form == "caption"
    chain = Chain(said, "i", "r", answer if caption else "c", None if caption else answer)
    return {
        "key": "1",
        "form": form,
        "choices": CHOICES if form == "choice" else None,
        "answer": truth,
        "plain": plain,
        "shown": shown,
        "degradations": [d._asdict() for d in true],
        "response": answer if plain else render(chain),
        "length": length,
        "truth_length": truth_length,
        "truncated": False,
    } | more


ROWS = [
    row(D((NOISE, 0.5)), D((NOISE, 0.3))),  # matched, error .2; right
    row(D((BLUR, 0.5)), D((NOISE, 0.3)), answer="1", length=40),  # mistaken; wrong
    row(
        D((NOISE, 0.8), (DARK, 0.5)), D((NOISE, 0.8), (DARK, 0.9)), answer="none of them"
    ),  # both matched, error .4; unread
    row(D((GRAFFITI, 0.1)), D()),  # clean: not among the damaged
    row(D(), D((NOISE, 0.25)), shown="0.25", truth_length=None),
    row(D(), D(), shown="clean", truth_length=None),
    row(D(), D((NOISE, 1.0)), shown="1", answer="3", truth_length=None),
]


def test_summary_by_hand():
    judged = metrics.damaged([metrics.judge(r) for r in ROWS])
    assert len(judged) == 3
    s = metrics.summary(judged)
    assert s["r_deg"].value == pytest.approx((0.8 - 2 + 1.6) / 3)
    assert s["r_len"].value == pytest.approx((0.75 + 1 + 0.75) / 3)
    assert s["type_f1"].value == pytest.approx(2 * 3 / (4 + 4))
    assert (
        s["intensity_error"].value == pytest.approx((0.2 + 0.4) / 3)
        and s["intensity_error"].n == 2
    )
    assert s["choice_accuracy"] == statistics.wilson(1, 3) and s[
        "well_formed"
    ] == statistics.wilson(3, 3)
    assert s["length"].value == pytest.approx(140 / 3) and s[
        "truncated"
    ] == statistics.wilson(0, 3)


def test_measures_compare_record_by_record():
    before = metrics.measures([metrics.judge(r) for r in ROWS[:3]])
    after = metrics.measures([metrics.judge(ROWS[0])] * 3)
    assert before.keys() == after.keys() and all(
        len(v) == 3 for pair in before.values() for v in pair
    )
    right, right_before = (found["choice_accuracy"][0] for found in (after, before))
    assert statistics.paired_difference(right, right_before).value == pytest.approx(2 / 3)


def test_level_borders():
    levels = [metrics.level(total) for total in (0.01, 0.74, 0.75, 1.49, 1.5, 3.0)]
    assert levels == ["light", "light", "medium", "medium", "strong", "strong"]
    clean, hurt, unknown = (
        row(D(), D()),
        row(D(), D((NOISE, 0.3))),
        {"degradations": None},
    )
    judged = [metrics.judge(r) for r in (clean, hurt, hurt | unknown)]
    assert [metrics.strength(r) for r in judged] == ["none", "light", None]
    assert metrics.strength(judged[0] | {"strength": "high"}) == "high"  # a benchmark's own


def test_table_1_by_hand():
    caption = "a red star top left on sand"
    rows = ROWS + [
        row(D(), D((NOISE, 0.5)), "top", "top", "open"),
        row(D(), D((NOISE, 0.6)), "on sand", caption, "caption"),
        row(D(), D((NOISE, 0.7)), caption, caption, "caption"),
        row(D(), D((NOISE, 0.7)), "x", None, "open"),
    ]
    table = metrics.table_1([metrics.judge(r) for r in rows])
    assert table["choice none"] == statistics.wilson(1, 1)._asdict() | {"unparsed": 0}
    assert table["choice light"] == statistics.wilson(1, 2)._asdict() | {"unparsed": 0}
    assert table["choice strong"] == statistics.wilson(0, 1)._asdict() | {"unparsed": 1}
    # the one without a true answer is not scored
    assert table["open light"]["value"] == 1 and table["open light"]["n"] == 1
    assert table["caption light"]["value"] == pytest.approx((1 + 2 / 3) / 2)
    assert table["open medium"]["value"] is None and table["open medium"]["n"] == 0
    assert (
        table["overall"]["value"] == pytest.approx((0.5 + 0 + 1 + 5 / 6) / 4)
        and table["overall"]["cells"] == 4
    )
    assert (
        table["per question"]["value"] == pytest.approx((1 + 0 + 0 + 1 + 2 / 3 + 1) / 6)
        and table["per question"]["n"] == 6
    )


def test_table_2_by_hand():
    table = metrics.table_2([metrics.judge(r) for r in ROWS])
    assert list(table) == ["clean", "0.25", "1"]
    assert (
        table["clean"]
        == table["0.25"]
        == statistics.wilson(1, 1)._asdict() | {"unparsed": 0}
    )
    assert table["1"]["value"] == 0


def test_versus_counts_what_turned_right_and_wrong():
    """The paper's low MCQ cell: 109 and 111 of 170, so two questions, and p = 0.82."""

    def ask(i, right):
        return row(D(), D((NOISE, 0.3)), answer="0" if right else "1", key=str(i))

    before = [ask(i, i < 109) for i in range(170)]
    after = [ask(i, 9 <= i < 120) for i in range(170)]
    found = metrics.versus(after[::-1] + [ask(999, True)], before)
    assert list(found) == ["light"]
    light = found["light"]
    assert (light["n"], light["gained"], light["lost"]) == (170, 11, 9)
    assert light["value"] == pytest.approx(2 / 170) and light["low"] < 0 < light["high"]
    assert light["p"] == pytest.approx(0.8238, abs=1e-4)
    keyed = [r | {"key": str(i)} for i, r in enumerate(ROWS)]
    names = ["none", "light", "strong", "clean", "0.25", "1"]
    assert list(metrics.versus(keyed, keyed)) == names


def test_confusion_by_hand():
    at = {name: i for i, name in enumerate(figure_6.TYPES)}
    counts = figure_6.confusion(
        [
            (D((NOISE, 0.1)), D((NOISE, 0.9))),  # right, whatever the intensity
            (D((BLUR, 0.5)), D((NOISE, 0.5))),  # mistaken
            (D((BLUR, 0.5), (DARK, 0.5)), D((NOISE, 0.5))),  # one of two was meant
            (D((NOISE, 0.5)), D((NOISE, 0.5), (DARK, 0.5))),  # missed
            (D((GRAFFITI, 0.5)), D()),
            (D(("fog", 0.5)), D((DARK, 0.1))),
        ]
    )  # invented; a name that does not exist
    expected = np.zeros_like(counts)
    expected[at[NOISE], at[NOISE]] = 2
    expected[at[NOISE], at[BLUR]] = 1.5
    expected[at[NOISE], at[DARK]] = 0.5
    expected[at[DARK], -1] = 1
    expected[-1, at[BLUR]] = expected[-1, at[DARK]] = 0.5
    expected[-1, at[GRAFFITI]] = 1
    expected[at[DARK], at["other"]] = 1
    np.testing.assert_allclose(counts, expected)


def test_confusion_keeps_the_numbers_of_true_and_named():
    rng, types = np.random.default_rng(0), figure_6.TYPES[:5]
    pairs = [
        tuple(
            D(*((types[i], 0.5) for i in rng.integers(5, size=rng.integers(4))))
            for _ in range(2)
        )
        for _ in range(200)
    ]
    counts = figure_6.confusion(pairs)
    for i, name in enumerate(types):
        assert counts[i].sum() == pytest.approx(
            sum(d.type == name for _, true in pairs for d in true)
        )
        assert counts[:, i].sum() == pytest.approx(
            sum(d.type == name for said, _ in pairs for d in said)
        )


def test_figure_6_by_hand():
    figure = figure_6.figure_6([metrics.judge(r) for r in ROWS])
    assert (
        figure["clean_called_damaged"]["value"] == 1
        and figure["clean_called_damaged"]["n"] == 1
    )
    assert [(p["true"], p["value"], p["n"]) for p in figure["intensity"]] == [
        (0.3, 0.5, 1),
        (pytest.approx(0.85), 0.65, 2),
    ]
    assert [(p["total"], p["truth"], p["value"], p["n"]) for p in figure["length"]] == [
        (0, 40, 50, 1),
        (0.3, 40, 45, 2),
        (pytest.approx(1.7), 40, 50, 1),
    ]
    types = {level: (e["value"], e["n"]) for level, e in figure["type_f1"].items()}
    assert types == {"light": (2 * 1 / 4, 2), "strong": (1, 1)}


def test_a_border_of_total_intensity_is_in_the_bin_below():
    rows = [row(D(), D((NOISE, s)), length=length) for s, length in ((0.25, 10), (0.3, 30))]
    points = figure_6.length_points([metrics.judge(r) for r in rows])
    assert points == [(1, 0.25, 40, 10), (2, 0.3, 40, 30)]


def test_a_plain_model_is_read_whole_and_has_no_figure_6(tmp_path):
    plain = report.of_model(
        [
            row([], D((NOISE, 0.3)), "0", plain=True),
            row([], D((NOISE, 0.3)), "the red one", plain=True),
        ]
    )
    assert (
        plain["table_1"]["choice light"]["value"] == 0.5
        and plain["table_1"]["choice light"]["unparsed"] == 1
    )
    assert "figure_6" not in plain and set(plain["summary"]) == {
        "choice_accuracy",
        "length",
        "truncated",
    }
    reports = {
        "base": plain,
        "sft": report.of_model(ROWS),
        "empty": report.of_model([ROWS[3]]),
    }
    json.dumps(reports, allow_nan=False)
    names = figures.draw_all(reports, tmp_path)
    assert sorted(names) == sorted(p.name for p in tmp_path.iterdir()) and len(names) == 5
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in names)


def test_markdown_and_cells():
    assert (
        cell(statistics.wilson(5, 10)._asdict() | {"unparsed": 2})
        == "0.500 [0.237, 0.763] n 10, 2 unread"
    )
    assert cell(statistics.bootstrap([])._asdict()) == "-" == cell(None)
    assert (
        markdown(["", "b"], [["long", "1"]]) == "|      | b |\n|------|---|\n| long | 1 |"
    )


def test_intensities_outside_the_range_end_no_report(tmp_path):
    rows = [row(D((NOISE, 1.4)), D((NOISE, 1.2))), row(D((NOISE, 0.5)), D((NOISE, -0.2)))]
    reports = {"sft": report.of_model(rows)}
    assert reports["sft"]["figure_6"]["intensity"] == []
    assert "figure_6a_types.png" in figures.draw_all(reports, tmp_path)
    assert "Figure 6" in report.as_text(reports)
