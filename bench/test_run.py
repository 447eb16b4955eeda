"""A run survives steps that fail, and says what they cost. No engine is needed: the steps are told here what to find."""

import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest

from bench import costs, images, run, steps
from bench.contenders import BARE, CONTENDERS, FULL, GOALS, GUIDE, LOST, OURS, SHORT, UV, WORKERS
from bench.figures import missed, reached


class Failing:
    """A step that finds the same figures for all, and fails as often as it is told of whom."""

    def __init__(self, **figures) -> None:
        self.figures, self.failures, self.calls = figures, {}, []

    def __call__(self, contender, *_):
        self.calls.append(contender.name)
        if self.failures.get(contender.name):
            self.failures[contender.name] -= 1
            raise AssertionError("parent snapshot does not exist: not found")
        return dict(self.figures)


@pytest.fixture
def taken(monkeypatch, tmp_path):
    """The steps of a run by name, none of which needs an engine."""

    @contextmanager
    def copied():
        yield tmp_path

    built = {"image": Failing(size=1), "rebuild": Failing(rebuild=1)}
    served = {"observe": Failing(log=True), "measure_round": Failing(served=2), "behind_proxy": Failing(proxied=3)}
    beside = {"first_answer": Failing(first=4), "record": Failing(record=5), "little_memory": Failing(grown=6)}
    for module, found in ((images, built), (steps, served), (costs, beside)):
        for name, step in found.items():
            monkeypatch.setattr(module, name, step)
    monkeypatch.setattr(images, "copied", copied)
    monkeypatch.setattr(images, "add_waiting", lambda _: None)
    monkeypatch.setattr(images, "build_wrk", lambda *_: {})
    monkeypatch.setattr(steps, "Wrk", nullcontext)
    return built | served | beside


def measured(extent=FULL) -> tuple[run.Run, list[int]]:
    """A run, and how many figures of each round's there were whenever it saved."""
    bench, saved = run.Run(extent, "3.15"), []
    bench.measure(lambda: saved.append(len(bench.figures["served"][OURS.name])))
    return bench, saved


def test_every_contender_is_built_once_and_has_its_turn_in_each_round(taken):
    bench, saved = measured()
    assert sorted(taken["image"].calls) == sorted(one.name for one in CONTENDERS if one is not WORKERS)
    assert taken["measure_round"].calls == [one.name for one in CONTENDERS] * FULL.rounds
    assert (saved, bench.left_out) == ([1, 2, 3, 3], [])


def test_step_that_fails_once_is_taken_again(taken):
    taken["measure_round"].failures[GUIDE.name] = 1
    bench, _ = measured()
    assert (len(bench.figures["served"][GUIDE.name]), bench.left_out) == (FULL.rounds, [])


def test_step_that_fails_twice_costs_its_round_only(taken):
    taken["measure_round"].failures[GUIDE.name] = 2
    bench, saved = measured()
    assert {name: len(found) for name, found in bench.figures["served"].items()} == {
        one.name: FULL.rounds - (one is GUIDE) for one in CONTENDERS
    }
    assert (saved[-1], bench.left_out) == (FULL.rounds, [f"round 1 of {FULL.rounds}, guide"])


def test_rebuild_that_fails_costs_its_own_figure_only(taken):
    taken["rebuild"].failures[OURS.name] = 2
    bench, _ = measured()
    assert len(bench.figures["rebuild"][OURS.name]) == FULL.rounds - 1
    assert len(bench.figures["served"][OURS.name]) == FULL.rounds


def test_contender_that_is_not_built_costs_its_own_figures_only(taken):
    taken["image"].failures[GUIDE.name] = 2
    bench, _ = measured()
    without = [one.name for one in CONTENDERS if one not in {GUIDE, WORKERS}]
    assert taken["measure_round"].calls == without * FULL.rounds
    assert bench.left_out == ["image, guide", "all of guide", "all of guide, 2 workers"]


def test_round_that_would_end_too_late_is_left_out(taken, monkeypatch):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(run.Run, "seconds", property(lambda _: next(clock)))
    bench, saved = measured(replace(FULL, contenders=(OURS, UV), rounds=99))
    assert 0 < saved[-1] < 99
    assert bench.seconds < run.LIMIT * 1.5
    assert bench.left_out == [f"round {saved[-1] + 1} of 99, and what follows: it would end after {run.LIMIT} s"]


def test_what_is_measured_once_is_of_this_project_and_its_log_beside_uvicorns(taken):
    bench, _ = measured()
    found = {
        measure: {name: len(values) for name, values in bench.figures[measure].items()} for measure in bench.figures
    }
    assert found["first"] == found["grown"] == {OURS.name: 1}
    assert found["record"] == {OURS.name: 1, BARE.name: 1}


def test_short_run_says_what_it_does_not_measure(taken):
    bench, _ = measured(SHORT)
    assert {"first", "record", "grown"}.isdisjoint(bench.figures)
    assert [line for line in bench.left_out if "a short run does not measure" in line] == bench.left_out != []


def test_run_ends_with_its_table_what_it_left_out_and_each_goal_that_is_missed(taken, monkeypatch, capsys):
    taken["image"].failures[BARE.name] = 2
    monkeypatch.setattr(sys, "argv", ["bench", "--fail=bare_fastapi"])
    monkeypatch.setattr(images, "break_build", lambda *_: None)
    monkeypatch.setattr(run, "machine", lambda _: {"load": 0})
    with pytest.raises(SystemExit) as end:
        run.main()
    printed = capsys.readouterr().out
    assert f"of about {FULL.expected()} s" in printed.splitlines()[0]
    assert "Left out: image, bare FastAPI" in printed
    assert [line for line in printed.splitlines() if line.startswith("served") and "bare FastAPI" not in line]
    assert len(str(end.value.code).splitlines()) == len(GOALS)


def figures_at(share: float) -> dict:
    """Figures that reach each goal by so much more than its bound, or miss it."""
    found = {}
    for goal in GOALS:
        bound = goal.bound * (share if goal.measure.startswith("requests per") else 1 / share)
        ours = found.setdefault(goal.measure, {}).setdefault(OURS.name, [100] if goal.other else [bound + (share < 1)])
        if goal.other:
            found[goal.measure][goal.other.name] = [ours[0] / bound]
    return found


def test_goals_are_reached_at_their_bounds_and_missed_beyond():
    assert missed(figures_at(1.001)) == []
    assert len(missed(figures_at(0.99))) == len(GOALS)
    assert [sentence.endswith("not measured") for sentence in missed({})] == [True] * len(GOALS)


def test_lost_request_of_any_round_counts():
    (goal,) = [goal for goal in GOALS if goal.measure == LOST]
    assert reached({goal.measure: {OURS.name: [0, 2, 0]}}, goal) == 2
