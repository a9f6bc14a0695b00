"""Channels: what goes matters least, what stays makes up for it, and nothing else changes."""

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import zoo
from surgery.test_couple import MODELS, VISION, answer, calm
from tersor.errors import BudgetError, OptionError, TaskError
from tersor.forms.form import rows
from tersor.measure import macs
from tersor.methods import run
from tersor.methods.cut.channels import channels
from tersor.methods.cut.criteria import CRITERIA
from tersor.methods.cut.evidence import Evidence
from tersor.methods.cut.merging import fitted, merge
from tersor.methods.cut.prices import prices
from tersor.methods.cut.ranking import Ranking, chosen
from tersor.methods.cut.removing import Costs, Removable, removable
from tersor.methods.quantize.rtn import rtn
from tersor.surgery.coupling import couple
from tersor.surgery.cut import cut
from tersor.task import Task, classification


class Net(nn.Module):
    """Two layers whose hidden units can go, and a batch norm between them."""

    def __init__(self, hidden: int = 8, width: int = 6) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, hidden, 3, padding=1), nn.BatchNorm2d(hidden)
        self.second, self.last = nn.Conv2d(hidden, width, 3, padding=1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).relu()).relu()
        return self.last(x.mean((2, 3)))


def net(**sizes: int) -> nn.Module:
    torch.manual_seed(0)
    model = Net(**sizes).train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(32, 3, 8, 8))
    return model.eval()


def pictures(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def task() -> Task:
    labels = torch.arange(96) % 4
    return classification(
        calibration=pictures(128), holdout=pictures(64, 1), train=(pictures(96, 2), labels)
    )


def units_of(model: nn.Module, inputs: Tensor) -> list[Removable]:
    return removable(model, couple(model, inputs), None, None)[0]


def evidence_of(model: nn.Module, task: Task, units: list[Removable]) -> Evidence:
    return Evidence(model, task, units, samples=128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_ranks_and_the_goal_is_reached(criterion, task):
    model = net()
    before = macs(model, pictures(2)).total
    done = run(model, [{"method": "cut.channels", "options": {"criterion": criterion}}], task)
    after = macs(done, pictures(2)).total
    # A unit more than needed, at most.
    assert 0.5 * before < after <= 0.7 * before
    outcome = done.recipe.steps[0].outcome
    assert outcome["after"] == pytest.approx(after)
    assert outcome["before"] == pytest.approx(before)
    assert outcome["kept"]["first.weight"].endswith(" of 8")
    assert type(done) is Net


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "mobilenet v2", "grouped", "unet"])
def test_whatever_the_network_it_gets_cheaper_and_runs(name):
    build, inputs = MODELS[name]
    inputs = inputs[0] if isinstance(inputs, tuple) else inputs
    torch.manual_seed(0)
    model = Headed(calm(build()))
    task = classification(calibration=inputs.repeat(8, *[1] * (inputs.dim() - 1)), holdout=inputs)
    before = macs(model, inputs).total
    channels(model, task, keep=0.9)
    assert macs(model, inputs).total <= 0.9 * before
    assert model(inputs).isfinite().all()


class Headed(nn.Module):
    """Gives one row of numbers for each sample, whatever the network gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        out = out if isinstance(out, Tensor) else next(iter(out.values()))
        return out.flatten(1)[:, :10]


@pytest.mark.parametrize("of", ["macs", "bytes", "latency"])
def test_it_counts_what_it_is_asked_to_count(of, task):
    model = net(hidden=16, width=16)
    before = sum(prices(model, pictures(2), of).values())
    outcome = (
        run(model, [{"method": "cut.channels", "options": {"of": of, "keep": 0.6}}], task)
        .recipe.steps[0]
        .outcome
    )
    assert outcome["after"] <= 0.6 * outcome["before"]
    if of == "bytes":
        assert before == 4 * sum(p.numel() for p in model.parameters())


def test_where_milliseconds_count_units_go_by_eights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    task = classification(calibration=torch.randn(64, 64), holdout=torch.randn(8, 64))
    channels(model, task, keep=0.6, of="latency")
    assert model[0].out_features < 256
    assert model[0].out_features % 8 == 0


def test_a_unit_that_repeats_another_goes_and_nothing_is_lost(task):
    # Unit 5 is three times unit 2, after a ReLU too: what reads it can read unit 2 instead.
    model = net()
    with torch.no_grad():
        for name in ("weight", "bias"):
            model.first.get_parameter(name)[5] = model.first.get_parameter(name)[2]
            model.norm.get_parameter(name)[5] = 3 * model.norm.get_parameter(name)[2]
        model.norm.running_mean[5] = model.norm.running_mean[2]
        model.norm.running_var[5] = model.norm.running_var[2]
    wanted = answer(model, pictures(9, 3))
    found = channels(copy.deepcopy(model), task, keep=0.9, include="first")
    assert found.first.out_channels == 7
    assert (answer(found, pictures(9, 3)) - wanted).abs().max() < 0.01 * wanted.abs().max()
    # Without merging, half of what was read is gone.
    bare = channels(copy.deepcopy(model), task, keep=0.9, include="first", merge=False)
    assert (answer(bare, pictures(9, 3)) - wanted).abs().max() > 0.05 * wanted.abs().max()


def test_merging_is_least_squares():
    # By lstsq on the rows themselves; damping as one more row for each input.
    torch.manual_seed(0)
    matrix, x, y = torch.randn(5, 12), torch.randn(400, 12), torch.randn(400, 12)
    kept = torch.rand(12) < 0.6
    own, cross = x.T @ x / 400, y.T @ x / 400
    damping = 0.01 * own.diagonal()[kept].mean()
    left = torch.cat((x[:, kept] / 20, damping.sqrt() * torch.eye(int(kept.sum()))))
    right = torch.cat((y @ matrix.T / 20, damping.sqrt() * matrix[:, kept].T))
    wanted = torch.linalg.lstsq(left, right).solution.T
    found = fitted(matrix, own[None], cross[None], kept)
    assert torch.allclose(found[:, kept], wanted, atol=1e-5)
    assert (found[:, ~kept] == 0).all()


def test_merging_changes_only_weights_that_read_what_goes(task):
    model = net()
    before = copy.deepcopy(model.state_dict())
    kept = torch.ones(72, dtype=torch.bool)
    kept[:9] = False
    assert merge(model, task, {"second.weight": kept}, samples=128) == set()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"second.weight"}
    assert (model.second.weight[:, 0] == 0).all()
    assert model.second.weight.requires_grad


def test_reconstruction_equals_fitting_anew_without_each_unit(task):
    model = net()
    units = units_of(model, pictures(2))
    group = next(g for g in units if g.name == "first.weight")
    evidence = evidence_of(model, task, units)
    noted: list[tuple[list[int], list[float]]] = []
    evidence.harm = lambda _, order, losses: noted.append((order, losses))  # type: ignore[method-assign]
    CRITERIA["reconstruction"](group, evidence)
    own = evidence.moments(group.readers[0])[0]
    matrix = rows(model.second.weight.detach(), 0).double()

    def loss(gone: list[int]) -> float:
        left = [c for u in range(8) if u not in gone for c in range(9 * u, 9 * u + 9)]
        new = torch.linalg.solve(own[left][:, left], (matrix @ own)[:, left].T).T
        error = matrix.clone()
        error[:, left] -= new
        return float(((error @ own) * error).sum() / ((matrix @ own) * matrix).sum())

    order: list[int] = []
    for _ in range(7):
        order.append(min((u for u in range(8) if u not in order), key=lambda u: loss([*order, u])))
    assert noted[0][0] == order
    expected = [loss(order[: n + 1]) for n in range(7)]
    assert noted[0][1] == pytest.approx(expected, rel=1e-6)


def test_gradients_of_a_gate_are_those_of_autograd(task):
    model = net()
    units = units_of(model, pictures(2))
    group = next(g for g in units if g.name == "first.weight")
    found = CRITERIA["taylor"](group, evidence_of(model, task, units))
    gate = torch.ones(8, requires_grad=True)
    model.norm.register_forward_hook(lambda _, __, out: out * gate[:, None, None])
    squares = torch.zeros(8)
    batches = list(task.train())
    for inputs, targets in batches:
        gate.grad = None
        nn.functional.cross_entropy(model(inputs), targets).backward()
        squares += gate.grad.square() / len(batches)
    assert found.order == squares.argsort().tolist()
    assert found.harms == pytest.approx(squares.sort().values.tolist(), rel=1e-4)


def test_scores_of_weights_and_activations_are_those_of_their_papers(task):
    model = net()
    units = units_of(model, pictures(2))
    group = next(g for g in units if g.name == "first.weight")
    evidence = evidence_of(model, task, units)
    weight, reads = model.first.weight.detach().flatten(1), model.second.weight.detach()
    with torch.no_grad():
        given = torch.cat([model.norm(model.first(b)).relu() for b in task.calibration()])
    given = given.transpose(0, 1).flatten(1)
    far = torch.stack([(weight - row).norm(dim=1).sum() for row in weight])
    correlation = given @ given.T
    cosines = correlation / (given.norm(dim=1)[:, None] * given.norm(dim=1))
    expected = {
        "l1": weight.abs().sum(1),
        "l2": weight.norm(dim=1),
        "group_norm": weight.norm(dim=1) + reads.transpose(0, 1).flatten(1).norm(dim=1),
        "geometric_median": far,
        # What is read has zeros around it, and 64 places in all.
        "activation": given.abs().mean(1),
        "apoz": (given != 0).float().mean(1),
    }
    for name, scores in expected.items():
        ranking = CRITERIA[name](group, evidence)
        if name in ("activation", "apoz"):
            # A kernel sees the border of zeros as well, so the scores are nearly in proportion.
            harms = torch.tensor(ranking.harms)[torch.tensor(ranking.order).argsort()]
            assert torch.corrcoef(torch.stack((harms, scores)))[0, 1] > 0.99
        else:
            assert ranking.order == scores.argsort().tolist()
            assert ranking.harms == pytest.approx((scores / scores.mean()).sort().values.tolist())
    first = CRITERIA["similarity"](group, evidence).order[0]
    cosines.fill_diagonal_(0)
    assert first in divmod(int(cosines.abs().argmax()), 8)


def test_the_least_harm_for_what_is_saved_goes_first():
    # One group of each kind; prices are such that a unit of b saves twice what one of a does.
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 6))
    groups = units_of(model, torch.randn(2, 2))
    rankings = [Ranking([3, 2, 1], [1.0, 4.0, 9.0]), Ranking([0, 1, 2], [3.0, 3.0, 3.0])]
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    coupling = couple(model, torch.randn(2, 2))

    def costs() -> Costs:
        return Costs.of(coupling, shapes, prices(model, torch.randn(1, 2), "macs"))

    # 8 + 16 + 24 multiply-adds; a unit of the first saves 2 + 4 and one of the second 4 + 6.
    # Harms by saving: 1/6 for the first; then 4/6 or 3/9, 3/9 and so on, as the middle shrinks.
    assert costs().total == 48
    assert chosen(groups, rankings, costs(), 42, steps=[1, 1], by_saving=True) == [[3], []]
    assert chosen(groups, rankings, costs(), 41, steps=[1, 1], by_saving=True) == [[3], [0]]
    assert chosen(groups, rankings, costs(), 20, steps=[1, 1], by_saving=True) == [[3], [0, 1, 2]]
    assert chosen(groups, rankings, costs(), 41, steps=[1, 1], by_saving=False) == [[3], [0]]
    with pytest.raises(BudgetError):
        chosen(groups, rankings, costs(), 2, steps=[1, 1], by_saving=True)


@pytest.mark.parametrize("name", ["squeeze", "inception", "unet", "mobilenet v2", "resnet"])
def test_what_it_counts_is_what_is_measured_after(name):
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    coupling = couple(model, inputs)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    costs = Costs.of(coupling, shapes, prices(model, inputs, "macs"))
    assert costs.total == pytest.approx(macs(model, inputs).total)
    for group in coupling.groups:
        costs.remove(group, len(group.units) // 2)
    cut(model, inputs, coupling, [u for g in coupling.groups for u in g.units[: len(g.units) // 2]])
    assert costs.total == pytest.approx(macs(model, inputs).total)


def test_excluded_layers_keep_their_values(task):
    model = net()
    done = run(
        model, [{"method": "cut.channels", "options": {"keep": 0.9, "exclude": "last"}}], task
    )
    assert torch.equal(done.last.weight, model.last.weight)
    assert done.second.out_channels == 6
    assert done.recipe.steps[0].outcome["left"]["second.weight"] == "it was not chosen"


def test_heads_go_whole_and_norms_stay_wide():
    torch.manual_seed(0)
    model = hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=10)).eval()
    images = torch.randn(32, 3, 64, 64)
    channels(model, classification(calibration=images, holdout=images[:8]), keep=0.8)
    for layer in model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer:
        for part in layer.modules():
            if isinstance(part, nn.LayerNorm):
                assert part.normalized_shape == (32,)


def test_what_cannot_be_done_is_refused(task):
    with pytest.raises(TaskError, match=r"cut\.channels needs inputs"):
        channels(net())
    with pytest.raises(BudgetError, match=r"keep=0\.01: at most 9\d% of the macs can be cut"):
        channels(net(), task, keep=0.01)
    with pytest.raises(OptionError, match=r'"first\.weight" of shape .* is held as affine'):
        channels(rtn(net(), include="first"), task)
    with pytest.raises(OptionError, match=r"nothing that can be cut .*exclude less"):
        channels(net(), task, exclude=["first", "second"])
    unlabelled = classification(calibration=pictures(32), holdout=pictures(8, 1))
    with pytest.raises(TaskError, match='criterion="taylor" looks at the loss on labels'):
        channels(net(), unlabelled, criterion="taylor")
    for keep in (0.0, 1.0, -1.0, 7.0):
        with pytest.raises(OptionError, match=r"cut\.channels: keep="):
            channels(net(), task, keep=keep)


@pytest.mark.slow
def test_half_of_a_real_network_goes_without_training(shared_data):
    images, _ = zoo.cifar10("train")
    task = classification(
        test=zoo.cifar10("test"), calibration=images[:512], holdout=images[512:768]
    )
    model = zoo.resnet20().eval()
    before = macs(model, images[:2]).total
    channels(model, task, keep=0.476)
    assert before / macs(model, images[:2]).total >= 2.1
    assert task.evaluate(model)["accuracy"] >= 80


@pytest.mark.parametrize("criterion", ["activation", "apoz"])
def test_readers_whose_inputs_are_not_seen_are_passed_over(criterion):
    torch.manual_seed(0)
    up = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, 2)).eval()
    task = classification(calibration=torch.randn(8, 3, 8, 8))
    task.predict = lambda model, inputs: model(inputs).mean((2, 3))
    with pytest.raises(OptionError, match="inputs cannot be seen"):
        channels(up, task, criterion=criterion, merge=False)
