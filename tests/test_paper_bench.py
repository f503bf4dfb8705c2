"""bench/paper.py: which run is compared with which, and in which direction; what is asked of a
model with the damage forced or the picture blanked."""

import held_out
import paper
import pytest

from rr1 import records

LEVEL = {"none": 0.0, "light": 0.5, "medium": 1.0, "strong": 2.0}


def answers(right, r_deg=0.0):
    """Forty answers at each level; the first `right` of each are right."""
    rows = []
    for level, total in LEVEL.items():
        for i in range(40):
            row = {
                "form": "open",
                "level": level,
                "total": total,
                "score": float(i < right),
            }
            row |= {"r_deg": r_deg, "type_f1": 0.5, "r_len": 0.5, "length": 30 + 10 * total}
            rows.append(row)
        rows.append(rows[-1] | {"form": "caption", "score": 0.5})
    return rows


@pytest.fixture()
def rows():
    """All arms the same, but: plain is better than the base, sft than plain, `answer` than sft;
    another picture's damage hurts sft."""
    right = {"base": 10, "plain": 20, "sft": 30, "answer": 36}
    found = {}
    for arm in paper.ARMS:
        seeds = [0] if arm == "base" else [0, 1]
        made = answers(right.get(arm, 30), r_deg=0.3 if arm == "answer" else 0.1)
        found[arm, held_out.OWN] = dict.fromkeys(seeds, made)
    for arm in paper.FORCED:
        own = found[arm, held_out.OWN]
        for condition in paper.FORCINGS:
            found[arm, condition] = own
    found["sft", held_out.OTHER] = dict.fromkeys([0, 1], answers(20))
    return found


def cells(report, start):
    rows = [line.replace("*", "").strip("|").split("|") for line in report.splitlines()]
    [[_, *found]] = [row for row in rows if row[0].strip() == start]
    return [cell.strip() for cell in found]


def test_the_report_says_who_is_better(rows):
    report = paper.report(rows)
    assert cells(report, "plain minus base")[0].startswith("+0.250 [")
    assert cells(report, "sft minus plain") == cells(report, "plain minus base")
    assert cells(report, "answer minus sft")[0].startswith("+0.150 [")
    assert cells(report, "answer minus sft")[1] == "2 of 2"
    assert cells(report, "paper minus sft") == ["+0.000 [+0.000, +0.000]", "0 of 2"]
    assert cells(report, "sft: true minus another's damage")[0].startswith("+0.250 [")
    assert cells(report, "answer: own minus blank picture")[0].startswith("+0.000")
    assert cells(report, "r_deg: answer minus sft")[0].startswith("+0.200 [")
    base, sft = cells(report, "base"), cells(report, "sft")
    assert base[:5] == ["0.250"] * 4 + ["0.500"] and base[-1] == "1"
    # lengths follow the damage exactly
    assert sft[-2:] == ["1.00", "2"]


def test_without_controls_the_report_has_the_main_arms_alone(rows):
    few = {key: answered for key, answered in rows.items() if key[0] in paper.ARMS[:4]}
    whole, short = paper.report(rows), paper.report(few)
    assert "own best minus sft" in whole and "own best" not in short
    for start in ("answer", "answer minus plain", "r_deg: answer minus sft"):
        assert cells(short, start) == cells(whole, start)


def test_the_figure_draws_each_level(rows):
    [axis] = paper.figure(rows).axes
    drawn = [line.get_label() for line in axis.lines]
    assert drawn == ["base", "plain", "sft", "answer", "longer"]
    assert list(axis.lines[0].get_ydata()) == [0.25] * 4


def test_the_damage_is_written_for_the_model(checkpoint, world_folder, tmp_path):
    """The true damage, or another picture's; a blank picture is another picture; what is answered
    is not asked again."""
    found = records.read(str(world_folder / "test.jsonl"))
    made = {
        condition: held_out.answers(
            checkpoint,
            found,
            tmp_path / f"{condition}.jsonl",
            plain=False,
            condition=condition,
        )
        for condition in (held_out.OWN, held_out.TRUE, held_out.OTHER, held_out.BLANK)
    }
    assert all(len(rows) == len(found) for rows in made.values())
    for condition, shift in ((held_out.TRUE, 0), (held_out.OTHER, 8)):
        for i, row in enumerate(made[condition]):
            truth = found[(i + shift) % 16]["degradations"]
            assert [tuple(d) for d in row["forced"]] == truth
    own, blank = (
        [row["response"] for row in made[c]] for c in (held_out.OWN, held_out.BLANK)
    )
    assert own != blank
    again = held_out.answers(
        "nowhere", found, tmp_path / f"{held_out.OWN}.jsonl", plain=False
    )
    assert again == made[held_out.OWN]
