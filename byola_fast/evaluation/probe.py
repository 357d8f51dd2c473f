"""The linear probe: a logistic regression on frozen embeddings, by scikit-learn."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from byola_fast.evaluation.tasks import Round, Task, TaskError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C, inverse strength of the regularisation, from strong to weak
MAX_ITERATIONS = 300
ONE_THREAD = 1 << 23  # features; with fewer, one thread is faster than many


class Scores(NamedTuple):
    """The scores of a probe on its test clips.

    Attributes:
        test: numbers of the clips.
        truth: ``(clips, classes)`` bool.
        scores: ``(clips, classes)`` logits, of a softmax or, in a multi-label task, of a sigmoid; minus infinity for
            classes that train lacks.
        strength: the chosen C.
        chosen_by: its score on valid.
    """

    test: list[int]
    truth: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float64]
    strength: float
    chosen_by: float


def truth_table(task: Task) -> npt.NDArray[np.bool_]:
    """Return ``(clips, classes)`` bool: which clip has which label."""
    import numpy as np

    number = {label: k for k, label in enumerate(task.classes)}
    table = np.zeros((len(task.labels), len(task.classes)), bool)
    for row, labels in enumerate(task.labels):
        table[row, [number[label] for label in labels]] = True
    return table


def fit_probe(features: npt.NDArray[np.float32], task: Task, plan: Round) -> Scores:
    """Train a probe for each C, choose one on valid, train it on train and valid, and test it.

    Features are standardised (mean 0, std 1 over the training clips). The probe is one multinomial regression, or one
    binary regression per label in a multi-label task. The smallest C within one clip of the best accuracy is chosen: a
    single clip is no reason for a weaker regularisation. In a multi-label task it is the smallest C of the best mean
    average precision.

    Args:
        features: ``(clips, d)``.
        task: their labels.
        plan: the clips for training, choosing and testing.

    Raises:
        ImportError: scikit-learn is missing; says how to install it. TaskError: a training part of one class.
    """
    import numpy as np

    truth = truth_table(task)
    if not task.multi_label and len({task.labels[number] for number in plan.train}) < 2:
        message = "clips of one class are left to learn from, without those that choose C; expected two classes"
        raise TaskError(f"{task.name}: {message}; give more clips, or a split valid")
    multi, asked = task.multi_label, truth[plan.valid]
    reached = [headline(asked, _fit(features, truth, plan.train, plan.valid, c, multi), multi) for c in STRENGTHS]
    enough = max(reached) - (0 if multi else 1.5 / len(asked))  # one clip, beyond rounding
    strength, value = next((c, value) for c, value in zip(STRENGTHS, reached, strict=True) if value >= enough)
    scores = _fit(features, truth, sorted([*plan.train, *plan.valid]), plan.test, strength, multi)
    return Scores(plan.test, truth[plan.test], np.asarray(scores, np.float64), strength, value)


def _fit(
    features: npt.NDArray[np.float32],
    truth: npt.NDArray[np.bool_],
    learn: list[int],
    ask: list[int],
    strength: float,
    multi_label: bool,
) -> npt.NDArray[np.float64]:
    """Return logits ``(ask, classes)``."""
    import numpy as np

    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
        from threadpoolctl import threadpool_limits  # scikit-learn's own
    except ImportError as error:
        raise ImportError("evaluation needs scikit-learn: pip install scikit-learn") from error

    scaler = StandardScaler().fit(features[learn])
    x, asked = scaler.transform(features[learn]), scaler.transform(features[ask])
    answer = np.full((len(ask), truth.shape[1]), -np.inf)
    threads = 1 if x.size < ONE_THREAD else None
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the weakest C, which valid then rejects
        if multi_label:
            for k in np.flatnonzero(truth[learn].any(0) & ~truth[learn].all(0)):
                probe = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS).fit(x, truth[learn][:, k])
                answer[:, k] = probe.decision_function(asked)
            return answer
        labels = truth[learn].argmax(1)
        probe = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS).fit(x, labels)
        logits = probe.decision_function(asked)
        answer[:, probe.classes_] = logits if logits.ndim == 2 else np.stack([0 * logits, logits], 1)
    return answer


def probabilities(scores: npt.NDArray[np.float64], multi_label: bool) -> npt.NDArray[np.float64]:
    """Return the probability of each class for each clip: a softmax, or in a multi-label task sigmoids."""
    import numpy as np

    if multi_label:
        return np.exp(-np.logaddexp(0, -scores))
    shifted = np.exp(scores - scores.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True), np.float64)


def headline(truth: npt.NDArray[np.bool_], scores: npt.NDArray[np.float64], multi_label: bool) -> float:
    """Return accuracy, or mean average precision over the classes that occur."""
    if multi_label:
        return _mean([value for value, _count in class_scores(truth, scores, True) if value is not None])
    return float((scores.argmax(1) == truth.argmax(1)).mean())


def macro(truth: npt.NDArray[np.bool_], scores: npt.NDArray[np.float64], multi_label: bool) -> float:
    """Return the mean over the classes that occur, of recall or average precision."""
    return _mean([value for value, _count in class_scores(truth, scores, multi_label) if value is not None])


def class_scores(
    truth: npt.NDArray[np.bool_], scores: npt.NDArray[np.float64], multi_label: bool
) -> list[tuple[float | None, int]]:
    """Return each class's recall (or average precision) and number of clips; None for a class without clips."""
    import numpy as np
    from sklearn.metrics import average_precision_score

    finite = np.where(np.isfinite(scores), scores, -1e30)
    hits: Any = scores.argmax(1)[:, None] == np.arange(truth.shape[1])
    answer: list[tuple[float | None, int]] = []
    for k in range(truth.shape[1]):
        positive, count = truth[:, k], int(truth[:, k].sum())
        if not count:
            answer.append((None, 0))
        elif multi_label:
            answer.append((float(average_precision_score(positive, finite[:, k])), count))
        else:
            answer.append((float(hits[positive, k].mean()), count))
    return answer


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
