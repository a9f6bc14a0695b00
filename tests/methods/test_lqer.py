"""Low-rank correction: the best one of its rank, where inputs look, and only where it helps."""

import copy

import pytest
import torch
from torch import nn

from tersor.errors import ModelError, OptionError
from tersor.forms import Affine, Residual
from tersor.methods import run
from tersor.methods.recover.lqer import lqer
from tersor.methods.spectra import low_rank
from tersor.surgery import walk
from tersor.task import classification

RTN = {"method": "quantize.rtn", "options": {"bits": 2}}
LQER = {"method": "recover.lqer", "options": {"rank": 4}}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32), nn.Linear(32, 4)
    ).eval()


def images(n: int, seed: int) -> torch.Tensor:
    """Smooth ones: most directions of what a layer is given are nearly empty."""
    small = torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(small, (8, 8), mode="bilinear")


@pytest.fixture
def task():
    return classification(calibration=images(256, 1), holdout=images(64, 2))


def spectrum(n: int, seed: int) -> torch.Tensor:
    """Inputs whose variances fall as 1 / i**2, turned."""
    generator = torch.Generator().manual_seed(seed)
    turned, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
    return (torch.randn(4 * n, n, generator=generator) / torch.arange(1, n + 1)) @ turned


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_factors_leave_less_of_the_outputs_error(rank, seed):
    """Reduced-rank regression (Izenman 1975, eq. 1.8): the optimum, by projecting the outputs."""
    error, x = (
        torch.randn(20, 16, generator=torch.Generator().manual_seed(seed)),
        spectrum(16, seed),
    )
    moments = (x.T @ x / len(x)).double()
    left, right = low_rank(error, moments, rank)
    assert (left.shape, right.shape) == ((20, rank), (rank, 16))
    missed = x @ (error - left @ right).T
    outputs = x @ error.T
    _, _, axes = torch.linalg.svd(outputs, full_matrices=False)
    best = outputs - outputs @ axes[:rank].T @ axes[:rank]
    assert float(missed.norm()) == pytest.approx(float(best.norm()), rel=2e-3)
    plain_left, plain_right = low_rank(error, None, rank)
    assert missed.norm() < (x @ (error - plain_left @ plain_right).T).norm()


def test_equal_moments_change_nothing():
    error = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    one = torch.matmul(*low_rank(error, torch.eye(7).double(), 2))
    other = torch.matmul(*low_rank(error, None, 2))
    assert torch.allclose(one, other, atol=1e-5)


def test_an_error_of_rank_one_is_taken_away_whole():
    # Rows (1, 2) and (2, 4): one pair of vectors is all there is.
    left, right = low_rank(torch.tensor([[1.0, 2.0], [2.0, 4.0]]), None, 1)
    assert torch.allclose(left @ right, torch.tensor([[1.0, 2.0], [2.0, 4.0]]))


def test_dead_inputs_are_no_obstacle():
    error = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    for moments in (torch.zeros(5, 5), torch.diag(torch.tensor([1.0, 0, 1, 0, 1]))):
        left, right = low_rank(error, moments.double(), 2)
        assert torch.isfinite(left @ right).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_answers_come_closer_for_a_few_bits_more(bits, task):
    original = net()
    step = {"method": "recover.lqer", "options": {"rank": 4, "factor_bits": bits}}
    done = run(original, [RTN, step], task)
    outcome = done.recipe.steps[-1].outcome
    assert outcome["kept"]
    assert outcome["layers"] == 2
    assert outcome["divergence_after"] < 0.7 * outcome["divergence_before"]
    # 32 x 4 would be outnumbered by 4 x (32 + 4).
    assert [type(site.form).kind for site in walk(done)] == ["residual", "residual", "affine"]
    before = run(original, [RTN])
    for old, new in zip(walk(before), walk(done), strict=True):
        if isinstance(new.form, Residual):
            assert torch.equal(new.form.base, old.weight)
            outputs, inputs = new.form.left.shape[0], new.form.right.shape[1]
            scales = 0 if bits == 16 else 2 * 4 * 16
            more = new.form.stored_bits() - old.form.stored_bits()
            assert more == 4 * (outputs + inputs) * bits + scales


def test_inputs_tell_where_errors_matter(task):
    original = net()
    apart = {}
    for name, data in (("inputs", task), ("none", None)):
        done = run(original, [RTN, LQER], data)
        with torch.no_grad():
            apart[name] = (done(images(200, 5)) - original(images(200, 5))).square().mean()
    assert apart["inputs"] < 0.8 * apart["none"]


def test_what_does_not_help_is_taken_back(task):
    coded = run(net(), [RTN])
    # Nothing was lost, so nothing can be won.
    done = lqer(copy.deepcopy(coded), task, original=coded, rank=2)
    outcome = done.recipe.steps[-1].outcome
    assert (outcome["kept"], outcome["divergence_before"]) == (False, 0.0)
    for old, new in zip(walk(coded), walk(done), strict=True):
        assert isinstance(new.form, Affine)
        assert torch.equal(new.form.codes, old.form.codes)


def test_scales_train_factors_too(task):
    original = net()
    step = {"method": "recover.lqer", "options": {"rank": 4, "factor_bits": 16}}
    tune = {"method": "recover.scales", "options": {"epochs": 3}}
    done = run(original, [RTN, step, tune], task)
    outcome = done.recipe.steps[-1].outcome
    assert outcome["kept"]
    assert outcome["trained"] >= 4 * (16 + 27) + 4 * (32 + 576)


def test_what_cannot_be_corrected_is_refused(task):
    original = net()
    with pytest.raises(OptionError, match="original=network"):
        lqer(run(original, [RTN]), task)
    with pytest.raises(OptionError, match=r"factor_bits=12; choose 2 to 8, or 16"):
        run(original, [RTN, {"method": "recover.lqer", "options": {"factor_bits": 12}}], task)
    with pytest.raises(OptionError, match="rank=300: Sequential has no quantized weight"):
        run(original, [RTN, {"method": "recover.lqer", "options": {"rank": 300}}], task)
    with pytest.raises(OptionError, match=r'"0\.weight" .* is corrected already'):
        run(original, [RTN, LQER, LQER], task)
    huge = classification(calibration=1e25 * images(8, 1))
    with pytest.raises(ModelError, match=r'"0\.weight": the squares of what it is given'):
        run(original, [RTN, LQER], huge)
    prune = {"method": "prune.magnitude", "options": {"sparsity": 0.5}}
    with pytest.raises(OptionError, match=r'"0\.weight" .* was pruned'):
        run(original, [prune, RTN, LQER], task)
    with pytest.raises(OptionError, match=r'original: it has no weight "0\.weight"'):
        lqer(run(original, [RTN]), task, original=nn.Linear(3, 3), rank=4)
