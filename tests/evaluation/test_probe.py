"""The linear probe: rounds, choice of C, probabilities, and metrics against hand counts."""

from __future__ import annotations

import numpy as np
import pytest

from byola_fast.evaluation import probe
from byola_fast.evaluation.probe import class_scores, fit_probe, headline, macro, probabilities
from byola_fast.evaluation.tasks import Round, Task, TaskError, rounds


def tasks(splits: list[str], labels: list[tuple[str, ...]]) -> Task:
    folds = [] if set(splits) & {"train", "test"} else sorted(set(splits))
    classes = sorted({label for own in labels for label in own})
    return Task(
        "t", [f"{n}" for n in range(len(splits))], labels, splits, classes, folds, any(len(x) > 1 for x in labels)
    )


def test_rounds():
    labels = [(("a", "b")[n % 2],) for n in range(40)]
    given = tasks(["train", "valid", "test", "train"] * 10, labels)
    assert list(rounds(given, 0)) == list(rounds(given, 1))
    (plan,) = rounds(given, 0)
    assert (len(plan.train), len(plan.valid), len(plan.test)) == (20, 10, 10)

    without = tasks(["train"] * 30 + ["test"] * 10, labels)
    seen = [next(rounds(without, seed)) for seed in range(3)]
    assert len({tuple(plan.valid) for plan in seen}) == 3
    for plan in seen:
        assert sorted(plan.train + plan.valid) == list(range(30))
        assert [sum(labels[n] == (x,) for n in plan.valid) for x in "ab"] == [3, 3]
        assert plan.test == list(range(30, 40))

    folds = tasks([("x", "y", "z", "w")[n // 2 % 4] for n in range(40)], labels)
    for plan, fold in zip(rounds(folds, 3), folds.folds, strict=True):
        assert {folds.splits[n] for n in plan.test} == {fold}
        assert len({folds.splits[n] for n in plan.valid}) == 1  # a whole fold, another one
        assert sorted(plan.train + plan.valid + plan.test) == list(range(40))
    two = tasks([("x", "y")[n // 2 % 2] for n in range(40)], labels)
    for plan in rounds(two, 0):
        assert (len(plan.train), len(plan.valid), len(plan.test)) == (16, 4, 20)


def test_the_test_part_is_for_testing_alone():
    rng = np.random.default_rng(0)
    labels = [(("a", "b")[n % 2],) for n in range(60)]
    task = tasks(["train", "train", "valid", "valid", "test", "test"] * 10, labels)
    features = rng.standard_normal((60, 5)).astype(np.float32)
    (plan,) = rounds(task, 0)
    before = fit_probe(features, task, plan)
    changed = features.copy()
    changed[plan.test] = 100 * rng.standard_normal((20, 5))
    after = fit_probe(changed, task, plan)
    assert (after.strength, after.chosen_by) == (before.strength, before.chosen_by)
    one = features.copy()
    one[plan.test[1:]] = changed[plan.test[1:]]
    assert np.array_equal(fit_probe(one, task, plan).scores[0], before.scores[0])


def test_metrics_by_hand():
    truth = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]], bool)
    scores = np.array([[2, 1, 0], [0, 1, 0], [3, 1, 0], [0, 5, -np.inf]], float)
    assert headline(truth, scores, False) == 3 / 4
    assert macro(truth, scores, False) == pytest.approx((2 / 3 + 1) / 2)  # the third class does not occur
    assert class_scores(truth, scores, False) == [(pytest.approx(2 / 3), 3), (1.0, 1), (None, 0)]
    both = np.array([[1, 1], [0, 1], [1, 0]], bool)
    ranked = np.array([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]])
    # class 0: hits at ranks 1 and 3: (1 + 2/3) / 2; class 1: hits at ranks 2 and 3: (1/2 + 2/3) / 2
    assert headline(both, ranked, True) == pytest.approx(((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2)


def test_two_classes_and_one_alone():
    rng = np.random.default_rng(1)
    labels = [(("a", "b")[n % 2],) for n in range(40)]
    features = (rng.standard_normal((40, 3)) + 5 * np.array([[n % 2, 0, 0] for n in range(40)])).astype(np.float32)
    task = tasks(["train", "train", "test", "test"] * 10, labels)
    (plan,) = rounds(task, 0)
    result = fit_probe(features, task, plan)
    assert headline(result.truth, result.scores, False) == 1
    only = Round([n for n in plan.train if n % 2], plan.valid, plan.test)
    with pytest.raises(TaskError, match="t: clips of one class are left to learn from"):
        fit_probe(features, task, only)


def test_the_fold_that_chooses_leaves_two_classes():
    folds = ["x", "y", "z"] * 10
    labels = [("a",) if fold == "x" else (("a", "b")[n // 3 % 2],) for n, fold in enumerate(folds)]
    task = tasks(folds, labels)
    for seed in range(8):
        for plan in rounds(task, seed):
            assert len({labels[n] for n in plan.train}) == 2


def test_one_clip_is_no_reason_for_a_larger_c(monkeypatch):
    """Right on valid: 6, 7, 9, 10, 10, 8 of 10 clips."""
    right, asked = dict(zip(probe.STRENGTHS, (6, 7, 9, 10, 10, 8), strict=True)), []

    def fit(_features, truth, _learn, ask, strength, _multi):
        asked.append(strength)
        hit = np.arange(len(ask)) < right[strength]
        return np.where(truth[ask] == hit[:, None], 1.0, 0.0)

    monkeypatch.setattr(probe, "_fit", fit)
    task = tasks(["train", "valid", "test"] * 10, [(("a", "b")[n % 2],) for n in range(30)])
    (plan,) = rounds(task, 0)
    result = fit_probe(np.zeros((30, 2), np.float32), task, plan)
    assert (result.strength, result.chosen_by, asked[-1]) == (1e-2, 0.9, 1e-2)


def test_probabilities():
    scores = np.array([[0.0, np.log(3), -np.inf], [1000.0, 1000.0, -1000.0]])
    assert probabilities(scores, False) == pytest.approx(np.array([[0.25, 0.75, 0], [0.5, 0.5, 0]]))
    assert probabilities(scores, True) == pytest.approx(np.array([[0.5, 0.75, 0], [1, 1, 0]]))
