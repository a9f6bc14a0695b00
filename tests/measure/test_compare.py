import copy
import json

import pytest
import torch
from torch import nn

import zoo
from tersor.errors import ModelError
from tersor.forms import Affine
from tersor.measure import compare, quality
from tersor.surgery import walk
from tersor.task import Task, classification, language_model, regression
from tersor.task.metrics import EMBEDDING


class Table(nn.Module):
    """Answers sample i (its number is the input) with row i of a table."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(torch.as_tensor(rows, dtype=torch.float32))

    def forward(self, x):
        return self.rows[x[:, 0].long()]


def numbers(n):
    return torch.arange(n)[:, None]


def deciding(labels, classes=3, sure=4.0):
    return Table(sure * nn.functional.one_hot(torch.tensor(labels), classes))


def test_flips_worked_by_hand():
    truth = [0, 0, 1, 1, 2, 2, 2, 0]
    before = [0, 0, 1, 0, 2, 0, 0, 0]
    #            broken  fixed     other
    after = [0, 1, 1, 1, 2, 1, 0, 0]
    task = classification(
        (numbers(8), torch.tensor(truth)), classes=["ant", "bee", "cat"], batch_size=3
    )
    found = compare(deciding(before), deciding(after), task)
    assert (found.on, found.n, found.notes) == ("test", 8, ())
    assert (found.flips.total, found.flips.broken, found.flips.fixed, found.flips.other) == (
        3,
        1,
        1,
        1,
    )
    flip = found.flips.examples[2]
    assert (flip.index, flip.before, flip.after, flip.target) == (5, "ant", "bee", "cat")
    assert [example.index for example in found.flips.examples] == [1, 3, 5]
    assert found.disagreement == 3 / 8
    assert 0 < found.disagreement_low < 3 / 8 < found.disagreement_high < 1
    assert found.mcnemar == 1.0
    rows = [(r.name, r.before, r.after, r.n) for r in found.per_class]
    assert rows == [
        ("ant", 100, pytest.approx(200 / 3), 3),
        ("bee", 50, 100, 2),
        ("cat", pytest.approx(100 / 3), pytest.approx(100 / 3), 3),
    ]
    assert found.metrics["accuracy"].delta == 0


def test_divergence_is_the_mean_kl_worked_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 - ln(3) / 2 ... on two of four samples.
    even, odd = [0.0, 0.0], [0.0, torch.tensor(3.0).log().item()]
    task = classification((numbers(4), torch.tensor([0, 1, 0, 1])))
    found = compare(Table([even] * 4), Table([even, even, odd, odd]), task)
    kl = torch.tensor(2.0).log().item() - torch.tensor(3.0).log().item() / 2
    assert found.divergence == pytest.approx(kl / 2, rel=1e-5)
    assert found.divergence_max == pytest.approx(kl, rel=1e-5)
    assert found.divergence_p95 == pytest.approx(kl, rel=1e-5)
    assert found.divergence_unit == "nats"


def test_one_pass_gives_the_qualities_of_both():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(90, 5, generator=generator), torch.randint(0, 4, (90,), generator=generator)
    first, second, task = nn.Linear(5, 4), nn.Linear(5, 4), classification((x, y))
    found = compare(first, second, task)
    assert found.before == quality(first, task)
    assert found.after == quality(second, task)
    assert found == compare(first, second, task)


def test_paired_intervals_are_narrower_than_unpaired_ones():
    generator = torch.Generator().manual_seed(1)
    truth = torch.randint(0, 3, (400,), generator=generator)
    right = torch.rand(400, generator=generator) < 0.7
    before = torch.where(right, truth, (truth + 1) % 3)
    after = before.clone()
    after[:8] = (truth[:8] + 2) % 3
    task = classification((numbers(400), truth), metrics=["accuracy"])
    change = compare(deciding(before.tolist()), deciding(after.tolist()), task).metrics["accuracy"]
    broken = int((before[:8] == truth[:8]).sum())
    assert change.delta == pytest.approx(-100 * broken / 400)
    # The naive interval of a difference of the same samples: sd of the per-sample differences.
    differences = 100 * ((after == truth).double() - (before == truth).double())
    half = 1.96 * differences.std().item() / 20
    assert (change.high - change.low) / 2 == pytest.approx(half, rel=0.2)
    assert change.low < change.delta < change.high
    assert change.high - change.low < (change.before.high - change.before.low) / 3


def test_a_model_compared_with_itself_has_changed_nothing():
    net = nn.Linear(4, 3)
    task = classification((torch.rand(20, 4), torch.zeros(20, dtype=torch.long)))
    found = compare(net, copy.deepcopy(net), task)
    assert (found.divergence, found.divergence_max, found.disagreement) == (0, 0, 0)
    assert found.disagreement_high > 0.1
    assert (found.flips.total, found.mcnemar) == (0, 1.0)
    assert all((c.delta, c.low, c.high) == (0, 0, 0) for c in found.metrics.values())


def test_without_labels_only_the_movement_is_compared_and_said_so():
    inputs = torch.rand(600, 4)
    task = classification(calibration=inputs[:500], holdout=inputs[500:])
    found = compare(nn.Linear(4, 3), nn.Linear(4, 3), task)
    assert (found.on, found.n, found.metrics, found.per_class) == ("holdout", 100, {}, ())
    assert found.mcnemar is None
    assert found.flips.broken is None
    assert found.flips.total == round(found.disagreement * 100) > 0
    assert found.flips.examples[0].target is None
    assert "no test data" in found.notes[0]
    assert "holdout inputs without targets" in found.notes[0]


def test_regression_and_language_have_their_own_measures():
    x = torch.rand(30, 4)
    found = compare(nn.Linear(4, 2), nn.Linear(4, 2), regression((x, torch.rand(30, 2))))
    assert (found.disagreement, found.flips, found.mcnemar) == (None, None, None)
    assert (found.divergence_unit, found.divergence > 0) == ("relative squared error", True)
    ids = torch.randint(0, 32, (5, 9), generator=torch.Generator().manual_seed(3))
    nets = [zoo.Stories(vocabulary=32, width=16, layers=1) for _ in range(2)]
    nn.init.constant_(nets[1].norm.weight, -1)
    spoken = compare(*nets, language_model(ids))
    assert (spoken.n, spoken.metrics["perplexity"].before.n) == (40, 40)
    assert 0 < spoken.disagreement <= 1
    assert spoken.per_class == ()


class Pairs(nn.Module):
    def __init__(self, turn):
        super().__init__()
        self.turn = nn.Parameter(torch.tensor(turn))

    def forward(self, angles):
        angles = angles[:, 0] + self.turn
        return torch.stack((angles.cos(), angles.sin()), 1)


def test_embeddings_are_compared_by_their_mean_cosine():
    angles, scores = 3 * torch.rand(40, 1), torch.rand(20)
    task = regression((angles, torch.zeros(40, 1)))
    pairs = Task("embedding", EMBEDDING, {"test": task._splits["test"]}, pooling=None)
    pairs.test = lambda: iter([(angles, scores)])
    found = compare(Pairs(0.0), Pairs(0.3), pairs)
    # Every embedding is turned by 0.3, so the cosines within pairs, and Spearman, stay.
    assert found.cosine == pytest.approx(torch.tensor(0.3).cos().item(), abs=1e-5)
    assert found.divergence == pytest.approx(1 - found.cosine, abs=1e-5)
    assert found.metrics["pearson"].delta == pytest.approx(0, abs=1e-3)


def test_json_has_the_names_that_reports_read():
    task = classification((numbers(3), torch.tensor([0, 1, 2])), classes=["a", "b", "c"])
    plain = compare(deciding([0, 1, 2]), deciding([0, 2, 2]), task).as_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["per_class"][1] == {"class": "b", "before": 100, "after": 0, "delta": -100, "n": 1}
    assert plain["flips"]["examples"] == [{"index": 1, "before": "b", "after": "c", "target": "b"}]
    assert plain["metrics"]["accuracy"]["before"]["value"] == 100
    assert plain["disagreement"] == pytest.approx(1 / 3)


def test_at_most_fifty_flips_are_shown():
    task = classification((numbers(70), torch.zeros(70, dtype=torch.long)))
    found = compare(deciding([0] * 70), deciding([1] * 70), task)
    assert (found.flips.total, found.flips.broken, len(found.flips.examples)) == (70, 70, 50)
    assert found.mcnemar == pytest.approx(2 / 2**70, rel=1e-9)


def test_other_shapes_and_nan_are_refused():
    task = classification((numbers(3), torch.tensor([0, 1, 1])))
    with pytest.raises(
        ModelError, match=r"test batch 1 the models give outputs of shape \(3, 2\) and \(3, 3\)"
    ):
        compare(deciding([0, 1, 1], 2), deciding([0, 1, 1], 3), task)
    broken = deciding([0, 1, 1], 2)
    nn.init.constant_(broken.rows, torch.nan)
    with pytest.raises(ModelError, match="Table gives NaN in 3 of the 3 outputs of test batch 1"):
        compare(deciding([0, 1, 1], 2), broken, task)


def test_resnet20_at_four_bits(shared_data):
    images, labels = zoo.cifar10()
    before, after = zoo.resnet20(), zoo.resnet20()
    for site in walk(after):
        site.hold(Affine.encode(site.weight, bits=4, axis=site.axis))
    found = compare(before, after, classification((images, labels), metrics=["accuracy"]))
    change = found.metrics["accuracy"]
    assert change.before.value == pytest.approx(91.64, abs=0.01)
    assert change.delta == pytest.approx(100 * (found.flips.fixed - found.flips.broken) / 1017)
    assert 0.02 < found.divergence < 0.5
    assert sum(row.n for row in found.per_class) == 1017
