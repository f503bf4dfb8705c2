"""rr1/doctor.py on made-up runs: every trouble, and the case just short of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from degrade import Degradation
from rr1 import doctor
from rr1.chain import Chain, render

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
HEALTHY = {
    "reward_std": 0.5,
    "zero_std": 0.1,
    "entropy": 0.4,
    "length": 50.0,
    "kl": 0.01,
    "truncated": 0.0,
    "sampler_gap": 1e-6,
    "skipped": 0.0,
    "seconds/rollout": 2.0,
    "seconds/score": 1.0,
    "seconds/update": 1.0,
}


def healthy() -> list[dict]:
    """A run whose reward rises by 0.01 a step, above and below its line in turn."""
    return [
        {"step": step, "reward": 0.01 * step + 0.1 * (-1) ** step, **HEALTHY}
        for step in range(1, STEPS + 1)
    ]


def write(folder: Path, rows: list[dict], rollouts: list[dict] = (), config=None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, lines in (("metrics.jsonl", rows), ("rollouts.jsonl", rollouts)):
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / name).write_text(text)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def examine(folder: Path, *args, **kwargs) -> list[str]:
    return doctor.examine(write(folder / "run", *args, **kwargs))


def test_a_healthy_run_has_nothing(tmp_path):
    assert examine(tmp_path, healthy()) == ["nothing found in 60 steps"]


# what the last ten steps hold: too much of it, and just not too much
EDGES = [
    ("zero spread within groups", "zero_std", 0.51, 0.5),
    ("collapse", "entropy", 0.099, 0.1),
    ("length running away", "length", 75.1, 75.0),
    ("length falling away", "length", 24.9, 25.0),
    ("KL exploding", "kl", 0.51, 0.5),
    ("everything truncated", "truncated", 0.51, 0.5),
    ("sampler and scorer apart", "sampler_gap", 0.11, 0.1),
    ("gradient not finite", "skipped", 1.0, 0.0),
]


def test_every_rule_has_an_edge():
    assert {(trouble, metric) for trouble, metric, *_ in EDGES} == {
        (rule.trouble, rule.metric) for rule in doctor.RULES
    }


@pytest.mark.parametrize(
    "trouble, metric, beyond, short", EDGES, ids=[edge[0] for edge in EDGES]
)
def test_a_metric_beyond_its_limit(tmp_path, trouble, metric, beyond, short):
    rows = healthy()
    for row in rows[50:]:
        row[metric] = beyond
    finding, advice = examine(tmp_path, rows)
    assert finding.startswith(f"{trouble} (step 51, line 51 of metrics.jsonl): {metric} ")
    assert advice.startswith("    ") and "{" not in advice
    for row in rows[50:]:
        row[metric] = short
    assert examine(tmp_path, rows) == ["nothing found in 60 steps"]


def test_one_odd_step_is_not_a_trouble(tmp_path):
    rows = healthy()
    rows[55] |= {"zero_std": 1.0, "kl": 0.6, "truncated": 1.0}
    assert examine(tmp_path, rows) == ["nothing found in 60 steps"]


def test_what_is_relative_to_the_start_waits_for_two_windows(tmp_path):
    rows = healthy()[:20]
    for row in rows[10:]:
        row["length"] = 100.0
    assert examine(tmp_path, rows)[0].startswith("length running away (step 11, ")
    assert examine(tmp_path, rows[:19]) == ["nothing found in 19 steps"]


def rising(by: float) -> list[dict]:
    """The reward is 0 or 1 in turn, and `by` more in the last third: its standard error there is
    the hypotenuse of two times 0.513 / sqrt(20), 0.162."""
    rows = healthy()
    for i, row in enumerate(rows):
        row["reward"] = i % 2 + by * (i >= 40)
    return rows


def test_a_flat_reward(tmp_path):
    finding, _ = examine(tmp_path, rising(0.32))
    assert finding.startswith(
        "reward flat (step 60, line 60 of metrics.jsonl): reward 0.5 in"
    )
    assert examine(tmp_path, rising(0.33)) == ["nothing found in 60 steps"]
    assert examine(tmp_path, rising(-0.5))[0].startswith("reward flat")
    assert examine(tmp_path, rising(0.32)[:29]) == ["nothing found in 29 steps"]


def test_a_run_slowed_by_another_process(tmp_path):
    rows = healthy()
    for i in (20, 30, 40):
        rows[i]["seconds/update"] = 5.1  # 8.1 seconds in all, and 4 in an ordinary step
    finding, _ = examine(tmp_path, rows)
    where = (
        "slowed by another process (step 21, line 21 of metrics.jsonl): 8.1 s, the median"
    )
    assert finding.startswith(where) and "3 such steps" in finding
    rows[40]["seconds/update"] = 5.0
    assert examine(tmp_path, rows) == ["nothing found in 60 steps"]


def spoken(silent: int, advantage: float, truth=(Degradation("noise", 0.5),)) -> list[dict]:
    """Sixteen responses in each of the last five steps, `silent` of which name no damage."""
    rows = []
    for step in range(STEPS - 4, STEPS + 1):
        for i in range(16):
            named = [] if i < silent else [Degradation("noise", 0.4)]
            rows.append(
                {
                    "step": step,
                    "truth": render(Chain(list(truth), "i", "r", "c")),
                    "response": render(Chain(named, "i", "r", "c")),
                    "advantage": advantage if i < silent else 0.0,
                }
            )
    return rows


def test_silence_that_is_paid(tmp_path):
    finding, _ = examine(tmp_path, healthy(), spoken(5, 0.4))
    assert finding.startswith(
        "silence paid (step 60, line 60 of metrics.jsonl): 25 of the last 80"
    )
    assert examine(tmp_path, healthy(), spoken(16, 0.0))[0].startswith("silence paid")
    nothing = ["nothing found in 60 steps"]
    assert examine(tmp_path, healthy(), spoken(4, 0.4)) == nothing
    assert examine(tmp_path, healthy(), spoken(5, -0.05)) == nothing
    # on a clean picture silence is right, and without a true chain nobody knows
    assert examine(tmp_path, healthy(), spoken(16, 0.4, truth=())) == nothing
    unknown = [row | {"truth": None} for row in spoken(16, 0.4)]
    assert examine(tmp_path, healthy(), unknown) == nothing


def test_several_troubles_and_the_options_of_the_run(tmp_path):
    rows = healthy()
    for row in rows[30:]:
        row |= {"kl": 2.0, "truncated": 0.9}
    lines = examine(tmp_path, rows, config={"lr": 0.001, "max_new_tokens": 48})
    assert [line.partition(" (")[0] for line in lines[::2]] == [
        "KL exploding",
        "everything truncated",
    ]
    assert "--lr (now 0.001)" in lines[1] and "--beta (now unknown)" in lines[1]
    assert "--max-new-tokens (now 48)" in lines[3]


def test_lines_are_counted_and_not_steps(tmp_path):
    """A look at held-out records before the first step is a line, and null is no value."""
    rows = [{"step": 0, "eval/accuracy": 0.5}, *healthy()]
    for row in rows[41:]:
        row["kl"] = None
    for row in rows[51:]:
        row["zero_std"] = 1.0
    finding, _ = examine(tmp_path, rows)
    assert finding.startswith(
        "zero spread within groups (step 51, line 52 of metrics.jsonl)"
    )


def run(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rr1.doctor", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command(tmp_path):
    done = run(write(tmp_path / "run", healthy()))
    assert (done.returncode, done.stdout) == (0, "nothing found in 60 steps\n")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert list(before) == ["metrics.jsonl"]
    done = run(tmp_path / "none")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and str(tmp_path / "none") in done.stderr


ODD = json.dumps(spoken(1, 0.0)[0] | {"advantage": "much"}) + "\n"


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("metrics.jsonl", "", "metrics.jsonl is empty"),
        ("metrics.jsonl", '{"step": 1, "kl": 0.1}\n{"step": 2, "k', "metrics.jsonl:2: "),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl:1: "),
        ("metrics.jsonl", '{"kl": 0.1}\n', "metrics.jsonl:1: "),
        ("metrics.jsonl", '{"step": 1, "kl": "much"}\n', "metrics.jsonl:1: "),
        ("metrics.jsonl", b'{"step": 1, "\xff": 1}\n', "metrics.jsonl:1: "),
        ("metrics.jsonl", '{"step": Infinity}\n', "metrics.jsonl:1: "),
        ("rollouts.jsonl", '{"step": 1, "advantage": 0}\n', "rollouts.jsonl:1: "),
        ("rollouts.jsonl", ODD, "rollouts.jsonl:1: "),
        ("config.json", "[1]", "config.json is not"),
        ("config.json", "{", "config.json is not"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, name, content, said):
    folder = write(tmp_path / "run", healthy(), spoken(0, 0.0), {})
    content = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        doctor.main([str(folder)])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out
    assert printed.err.count("\n") == 1 and f"{folder}/{said}" in printed.err
    assert (folder / name).read_bytes() == content
    shutil.rmtree(folder)
