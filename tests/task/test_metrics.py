import math

import pytest
import torch

from tersor.errors import OptionError, TaskError
from tersor.task import classification, regression
from tersor.task.metrics import (
    CLASSIFICATION,
    EMBEDDING,
    LANGUAGE,
    REGRESSION,
    average_ranks,
    chosen,
)

ALL = [CLASSIFICATION, REGRESSION, EMBEDDING, LANGUAGE]


def found(metric, outputs, targets):
    return metric.reduce(metric.sample(outputs, targets))


def logits_and_labels(seed, rows=203, classes=7):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    # Class 5 is never true, and class 6 is true but never decided.
    labels = torch.randint(0, classes, (rows,), generator=generator)
    logits[:, 6] = -9
    return logits, torch.where(labels == 5, 1, labels)


def amounts(seed, rows=101, columns=1):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 20, (rows, columns), generator=generator).float()
    return targets + torch.randn(rows, columns, generator=generator).round(), targets


def ranks_by_counting(values):
    """A value's rank: how many are smaller, plus the middle of those that are equal."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def correlation(first, second):
    a, b = (sum(v) / len(v) for v in (first, second))
    top = sum((x - a) * (y - b) for x, y in zip(first, second, strict=True))
    return top / math.sqrt(sum((x - a) ** 2 for x in first) * sum((y - b) ** 2 for y in second))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_classification_metrics_equal_a_count_by_hand(seed):
    logits, labels = logits_and_labels(seed)
    decided, true = logits.argmax(1).tolist(), labels.tolist()
    pairs = list(zip(decided, true, strict=True))
    precision, recall, f1 = [], [], []
    for label in sorted({*decided, *true}):
        hits = sum(d == t == label for d, t in pairs)
        of, there = decided.count(label), true.count(label)
        precision.append(hits / of if of else 0)
        recall.append(hits / there if there else 0)
        f1.append(2 * hits / (of + there))
    expected = {
        "accuracy": sum(d == t for d, t in pairs) / len(pairs),
        "precision": sum(precision) / len(precision),
        "recall": sum(recall) / len(recall),
        "f1": sum(f1) / len(f1),
    }
    for name, value in expected.items():
        assert found(CLASSIFICATION[name], logits, labels) == pytest.approx(100 * value)


@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_equal_scikit_learn(seed):
    reference = pytest.importorskip("sklearn.metrics")
    logits, labels = logits_and_labels(seed)
    decided = logits.argmax(1)
    f1 = reference.f1_score(labels, decided, average="macro", zero_division=0)
    assert found(CLASSIFICATION["f1"], logits, labels) == pytest.approx(100 * f1)
    top5 = reference.top_k_accuracy_score(labels, logits, k=5, labels=range(7))
    assert found(CLASSIFICATION["top5"], logits, labels) == pytest.approx(100 * top5)
    outputs, targets = amounts(seed, columns=3)
    for name, function in {
        "mae": reference.mean_absolute_error,
        "mse": reference.mean_squared_error,
        "r2": reference.r2_score,
    }.items():
        assert found(REGRESSION[name], outputs, targets) == pytest.approx(
            function(targets, outputs)
        )


def test_correlations_equal_the_definition_with_ties():
    outputs, targets = amounts(3)
    first, second = outputs[:, 0].tolist(), targets[:, 0].tolist()
    assert len(set(second)) < 25
    pearson = 100 * correlation(first, second)
    spearman = 100 * correlation(ranks_by_counting(first), ranks_by_counting(second))
    assert found(REGRESSION["pearson"], outputs, targets) == pytest.approx(pearson)
    assert found(REGRESSION["spearman"], outputs, targets) == pytest.approx(spearman)


def test_equal_values_share_the_mean_of_their_ranks():
    values = torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0])
    # 1 -> 1, 2 -> 2, and the three 3s share (3 + 4 + 5) / 3.
    assert average_ranks(values).tolist() == [4, 1, 4, 2, 4]


def test_calibration_error_equals_a_sum_over_bins():
    logits, labels = logits_and_labels(4)
    sure = (logits * 2).softmax(1).amax(1).tolist()
    right = ((logits * 2).argmax(1) == labels).tolist()
    total = 0.0
    for low in range(15):
        inside = [i for i, p in enumerate(sure) if low / 15 < p <= (low + 1) / 15]
        total += abs(sum(sure[i] for i in inside) - sum(right[i] for i in inside))
    error = found(CLASSIFICATION["calibration_error"], logits * 2, labels)
    assert error == pytest.approx(100 * total / len(sure), rel=1e-5)


def test_perplexity_worked_by_hand():
    # Probabilities 1/2 and 1/8 of the true tokens: exp of the mean of ln 2 and ln 8 is 4.
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.5, 0.375]]).log()
    assert found(LANGUAGE["perplexity"], logits, torch.tensor([0, 0])) == pytest.approx(4)
    assert not LANGUAGE["perplexity"].higher_is_better


def test_pair_metrics_read_the_cosine():
    # Cosines 1, 0 and -1 against rising scores: the order is exactly wrong.
    left = torch.tensor([[1.0, 0.0]] * 3)
    right = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    outputs = torch.stack((left, right), 1)
    scores = torch.tensor([0.0, 1.0, 5.0])
    assert found(EMBEDDING["spearman"], outputs, scores) == pytest.approx(-100)
    cosines = 100 * correlation([1, 0, -1], [0, 1, 5])
    assert found(EMBEDDING["pearson"], outputs, scores) == pytest.approx(cosines)


def test_statistics_of_batches_reduce_to_the_metric_of_all():
    logits, labels = logits_and_labels(5)
    for metric in CLASSIFICATION.values():
        parts = [
            metric.sample(a, b) for a, b in zip(logits.split(50), labels.split(50), strict=True)
        ]
        assert all(part.dtype == torch.float64 for part in parts)
        assert metric.reduce(torch.cat(parts)) == found(metric, logits, labels)


def test_an_output_that_is_not_a_number_counts_as_wrong():
    logits, labels = torch.eye(3) * 5, torch.arange(3)
    logits[0] = torch.nan
    assert found(CLASSIFICATION["accuracy"], logits, labels) == pytest.approx(200 / 3)
    # Class 0 has recall 0, classes 1 and 2 have 1.
    assert found(CLASSIFICATION["recall"], logits, labels) == pytest.approx(200 / 3)
    assert found(CLASSIFICATION["f1"], logits, labels) == pytest.approx(200 / 3)
    assert found(LANGUAGE["perplexity"], logits, labels) == math.inf


def test_a_constant_prediction_correlates_with_nothing():
    targets = torch.arange(5.0)[:, None]
    assert found(REGRESSION["spearman"], torch.ones(5, 1), targets) == 0
    assert found(REGRESSION["r2"], targets.mean().expand(5, 1), targets) == 0
    assert found(REGRESSION["r2"], targets, targets) == 1
    assert found(REGRESSION["rmse"], targets + 2, targets) == 2


@pytest.mark.parametrize("table", ALL)
def test_every_metric_reads_a_single_sample(table):
    for metric in table.values():
        if table is REGRESSION:
            outputs, targets = torch.ones(1, 1), torch.ones(1, 1)
        elif table is EMBEDDING:
            outputs, targets = torch.ones(1, 2, 4), torch.ones(1)
        else:
            outputs, targets = torch.eye(6)[:1], torch.zeros(1, dtype=torch.long)
        assert math.isfinite(found(metric, outputs, targets))


def test_values_that_would_broadcast_are_refused():
    with pytest.raises(TaskError, match=r"3 values .* targets have shape \(4, 1\)"):
        REGRESSION["mse"].sample(torch.ones(4, 3), torch.ones(4, 1))


def test_metrics_are_chosen_by_name_and_keep_their_order():
    assert list(chosen(["f1", "accuracy"], CLASSIFICATION)) == ["f1", "accuracy"]
    with pytest.raises(OptionError, match=r"\['bleu'\] are not among"):
        chosen(["bleu"], CLASSIFICATION)
    with pytest.raises(OptionError, match="at least one of"):
        chosen([], CLASSIFICATION)
    data = torch.ones(4, 2), torch.tensor([0, 1, 0, 1])
    assert next(iter(classification(data).metrics)) == "accuracy"
    assert next(iter(regression(data).metrics)) == "r2"
    assert "top5" not in classification(data).metrics
    assert "top5" in classification(data, classes=[*"abcdefghijk"]).metrics
