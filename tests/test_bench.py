"""Runs of the scripts for the comparisons in bench/: what is finished stays, what fails says so."""

import json
from dataclasses import dataclass

import pytest

import runs


@dataclass
class Config:
    out: str
    jobs: int = 2
    steps: int = 3


def write_run(folder, steps, rows=()):
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"steps": steps}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_folder_is_gone_on_with_only_as_it_was_begun(tmp_path):
    out = str(tmp_path / "t")
    assert runs.begin(Config(out), {"jobs"}) == tmp_path / "t"
    runs.begin(Config(out, jobs=1), {"jobs"})
    with pytest.raises(SystemExit, match="steps: was 3, now 4"):
        runs.begin(Config(out, steps=4), {"jobs"})


def test_what_is_finished_is_not_run_again(tmp_path, monkeypatch):
    write_run(tmp_path / "one", steps=3)
    started = []
    monkeypatch.setattr(runs, "run_all", lambda config, tasks: started.append(tasks))
    runs.train(Config(str(tmp_path)), {"one": ["a.py"], "two": ["a.py", "--x"]})
    assert started == [{"two": ["a.py", "--x", "--out", tmp_path / "two", "--resume"]}]


def test_the_seconds_of_each_step(tmp_path):
    rows = [
        {"step": i, "seconds/rollout": 2.0, "seconds/update": i, "reward": 9}
        for i in (1, 2)
    ]
    write_run(tmp_path / "one", 2, rows)
    assert runs.seconds(tmp_path / "one") == [3.0, 4.0]


def test_a_run_that_fails_ends_it_with_its_last_lines(tmp_path):
    with pytest.raises(SystemExit, match="(?s)bad failed with status 2; .*unrecognized"):
        runs.run_all(Config(str(tmp_path)), {"bad": ["degrade.py", "--no-such-option"]})
    runs.run_all(Config(str(tmp_path)), {"good": ["degrade.py", "--help"]})
    assert "usage" in (tmp_path / "good.log").read_text()


def test_calls_in_processes_keep_their_names(tmp_path):
    calls = {"a": (1, 2), "b": (4, 3)}
    assert runs.in_processes(Config(str(tmp_path)), max, calls) == {"a": 2, "b": 4}
