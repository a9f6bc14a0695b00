"""Low rank by singular values: outputs lose what is cut off, and ranks go where they pay."""

import pytest
import torch
from torch import Tensor, nn

from surgery.nets import NETS, Conv1D, make
from tersor.codec import load, save
from tersor.errors import OptionError, TaskError
from tersor.measure import macs
from tersor.methods import run
from tersor.methods.factorize.svd import svd
from tersor.methods.quantize.rtn import rtn
from tersor.methods.ranks import Way, chosen
from tersor.methods.spectra import energy_of, root, spectrum
from tersor.surgery import walk
from tersor.surgery.chain import Chain
from tersor.surgery.structure import structure_of
from tersor.task import classification


def turned(n: int, rows: int, seed: int) -> Tensor:
    """Inputs whose standard deviations fall as 1 / i, in directions of no layer's own."""
    generator = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    steps = torch.arange(1, n + 1, dtype=torch.float64)
    return torch.randn(rows, n, generator=generator, dtype=torch.float64) / steps @ axes


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    ).eval()


def images(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def task():
    return classification(calibration=images(128, 1), holdout=images(64, 2))


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (5, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize("measure", ["none", "inputs", "fisher"])
def test_what_is_lost_is_what_is_cut_off(shape, measure):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = turned(shape[1], 50, 1)
    gradients = turned(shape[0], 50, 2)
    inputs = None if measure == "none" else x.T @ x / 50
    answers = gradients.T @ gradients / 50 if measure == "fisher" else None
    found = spectrum(matrix, inputs, answers)
    for rank in range(1, min(shape) + 1):
        left, right = found.factors(rank)
        missed = energy_of(matrix - left @ right, inputs, answers)
        assert missed == pytest.approx(float(found.lost[rank]), rel=1e-10, abs=1e-18)
    assert torch.allclose(left @ right, matrix, rtol=1e-9, atol=1e-9)


def test_the_output_error_itself_is_what_is_cut_off():
    # With no damping: of the outputs for the very inputs that were seen.
    x, matrix = turned(24, 200, 3), torch.randn(16, 24, dtype=torch.float64)
    moments = x.T @ x / len(x)
    values, vectors = torch.linalg.eigh(moments)
    u, s, _ = torch.linalg.svd(matrix @ (vectors * values.clamp(min=0).sqrt()))
    for rank in (1, 5, 12):
        kept = u[:, :rank] @ u[:, :rank].T @ matrix
        error = float((x @ (matrix - kept).T).square().sum() / len(x))
        assert error == pytest.approx(float(s[rank:].square().sum()), rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_outputs_of_skewed_inputs_keep_nearly_all_at_an_eighth_of_the_ranks(seed):
    generator = torch.Generator().manual_seed(10 + seed)
    matrix = torch.randn(256, 256, generator=generator, dtype=torch.float64)
    x = turned(256, 4096, seed)
    moments = x.T @ x / len(x)
    lost = {}
    for name, inputs in (("inputs", moments), ("none", None)):
        left, right = spectrum(matrix, inputs).factors(32)
        missed = (x @ (matrix - left @ right).T).square().sum()
        lost[name] = float(missed / (x @ matrix.T).square().sum())
    assert lost["inputs"] <= 0.045
    assert lost["none"] >= 0.4


def test_a_layer_of_rank_one_worked_by_hand():
    # Rows (3, 4) and (6, 8): left (1, 2) / sqrt(5), right (3, 4) / 5, one value 5 * sqrt(5).
    found = spectrum(torch.tensor([[3.0, 4.0], [6.0, 8.0]]), None)
    assert found.energies.tolist() == pytest.approx([125.0, 0.0], abs=1e-12)
    left, right = found.factors(1)
    assert torch.allclose(left @ right, torch.tensor([[3.0, 4.0], [6.0, 8.0]]).double())
    assert float(left.norm()) == pytest.approx(float(right.norm()))


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_factors_of_the_paper(seed):
    """SVD-LLM, section 3.1: svd(W S) = P s Q^T with S of S S^T = X X^T; W' = P_k s_k Q_k^T S^-1."""
    matrix = torch.randn(9, 12, generator=torch.Generator().manual_seed(seed)).double()
    x = turned(12, 300, seed)
    moments = x.T @ x / 300
    damped = moments + 1e-4 * moments.diagonal().mean() * torch.eye(12)
    lower = torch.linalg.cholesky(damped)
    p, s, q = torch.linalg.svd(matrix @ lower, full_matrices=False)
    for rank in (1, 4, 8):
        expected = (p[:, :rank] * s[:rank]) @ q[:rank] @ torch.linalg.inv(lower)
        left, right = spectrum(matrix, moments).factors(rank)
        assert torch.allclose(left @ right, expected, atol=1e-9)


def test_a_root_squares_to_the_moments_with_their_damping():
    x = turned(6, 50, 0)
    moments = x.T @ x
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(6)
    assert torch.allclose(root(moments, 0.01) @ root(moments, 0.01), damped)
    assert torch.allclose(root(torch.zeros(3, 3)), 0.01 * torch.eye(3).double())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("keep", [0.45, 0.75])
def test_less_than_the_share_asked_for_remains(name, keep):
    layers, inputs = make(name)
    before = sum(site.weight.numel() for site in walk(layers))
    expected = make(name)[0](inputs).shape
    if name == "attention" or (name == "conv" and keep < 2 / 3):
        # Nothing but attention's own; a 6 -> 2 convolution of kernel 1, whose rank 1 keeps 2 / 3.
        with pytest.raises(OptionError, match=r"reads its weight|keep 0\.667"):
            svd(layers, keep=keep)
        return
    done = svd(layers, keep=keep)
    outcome = done.recipe.steps[-1].outcome
    assert outcome["remains"] <= keep
    assert sum(site.weight.numel() for site in walk(done)) < before
    assert done(inputs).shape == expected
    for path, found in outcome["layers"].items():
        assert isinstance(done.get_submodule(path), Chain)
        assert done.get_submodule(path).ranks == tuple(found["ranks"])
        assert 0 <= found["lost"] < 1


@pytest.mark.parametrize("of", ["bytes", "macs"])
@pytest.mark.parametrize("weigh", ["inputs", "fisher", "none"])
def test_what_remains_is_what_is_measured(of, weigh, task):
    original = net()
    options = {"keep": 0.6, "of": of, "weigh": weigh}
    done = run(original, [{"method": "factorize.svd", "options": options}], task)
    outcome = done.recipe.steps[-1].outcome
    layers = {path for path, reason in outcome["whole"].items() if "would not" not in reason}
    layers |= set(outcome["layers"])

    def cost(model: nn.Module) -> int:
        if of == "macs":
            found = macs(model, images(1, 0)).by_layer
        else:
            found = {site.name: site.weight.numel() for site in walk(model)}
        return sum(n for name, n in found.items() if name.split(".")[0] in layers)

    assert outcome["remains"] == pytest.approx(cost(done) / cost(original))
    assert 0.4 < outcome["remains"] <= 0.6


def test_latency_is_measured_and_saved(task):
    options = {"keep": 0.9, "of": "latency"}
    wide = nn.Sequential(nn.Flatten(), nn.Linear(192, 1024), nn.ReLU(), nn.Linear(1024, 512)).eval()
    done = run(wide, [{"method": "factorize.svd", "options": options}], task)
    assert done.recipe.steps[-1].outcome["remains"] <= 0.9
    assert macs(done, images(1, 0)).total < macs(wide, images(1, 0)).total


def test_inputs_tell_which_errors_matter():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    seen = turned(64, 600, 0).float()
    task, apart = classification(calibration=seen[:400]), {}
    for weigh in ("inputs", "none"):
        step = {"method": "factorize.svd", "options": {"weigh": weigh}}
        done = run(original, [step], task)
        with torch.no_grad():
            apart[weigh] = float((done(seen[400:]) - original(seen[400:])).square().mean())
    assert apart["inputs"] < 0.2 * apart["none"]


def test_a_network_of_low_rank_is_given_back_exactly():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), Conv1D(20, 20)).eval()
    with torch.no_grad():
        for layer in (original[0], original[2]):
            layer.weight.copy_(torch.randn(20, 3) @ torch.randn(3, 20))
    x = torch.randn(100, 20)
    done = run(original, [{"method": "factorize.svd", "options": {"keep": 0.31}}])
    assert [done[at].ranks for at in (0, 2)] == [(3,), (3,)]
    with torch.no_grad():
        assert torch.allclose(done(x), original(x), rtol=1e-4, atol=1e-4)


def test_ranks_go_where_they_pay():
    # Of 8 numbers 5 may stay: the second layer's rank 1 is nearly free, the first one's is dear.
    ways = {
        "dear": [Way((), 4, 0.0), Way((1,), 2, 9.0)],
        "cheap": [Way((), 4, 0.0), Way((1,), 1, 0.1), Way((2,), 2, 0.05)],
    }
    assert {name: way.ranks for name, way in chosen(ways, 5.5 / 8).items()} == {
        "dear": (),
        "cheap": (1,),
    }
    assert chosen(ways, 7 / 8)["cheap"].ranks == (2,)
    with pytest.raises(OptionError, match=r"keep=0\.3 is less than .* 2 layers, which keep 0\.375"):
        chosen(ways, 0.3)


def test_the_choice_of_ranks_is_that_of_trying_all():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ways = {}
        for name in "abc":
            losses = torch.rand(4, generator=generator).sort(descending=True).values.tolist()
            ways[name] = [Way((), 5.0, 0.0)] + [
                Way((r,), float(r), loss) for r, loss in enumerate(losses, 1)
            ]
        limit = float(3 + 11 * torch.rand(1, generator=generator))
        best = min(
            a.loss + b.loss + c.loss
            for a in ways["a"]
            for b in ways["b"]
            for c in ways["c"]
            if a.cost + b.cost + c.cost <= limit * (1 - 1e-3)
        )
        found = chosen(ways, limit / 15)
        assert sum(way.loss for way in found.values()) <= best + 1e-9
        assert sum(way.cost for way in found.values()) <= limit


def test_files_and_later_steps_take_links_as_layers(task, tmp_path):
    original = net()
    recipe = [
        {"method": "factorize.svd", "options": {"keep": 0.6}},
        {"method": "prune.magnitude", "options": {"sparsity": 0.3}},
        {"method": "quantize.rtn", "options": {"bits": 8}},
    ]
    done = run(original, recipe, task)
    path = save(done, tmp_path / "small.tersor", example=images(2, 0))
    with torch.no_grad():
        expected = done(images(4, 5))
        assert torch.allclose(load(path)(images(4, 5)), expected, atol=1e-5)
        fitted = load(path, into=net())
        assert torch.allclose(fitted(images(4, 5)), expected, atol=1e-5)
    assert structure_of(fitted).chains == structure_of(done).chains


def test_onnx_takes_links_as_layers(task, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from tersor.export import to_onnx

    done = run(net(), [{"method": "factorize.svd", "options": {"keep": 0.6}}], task)
    written = to_onnx(done, tmp_path / "net.onnx", example=images(2, 0))
    assert written.difference.relative < 1e-4


def test_layers_that_stay_whole_are_listed_with_the_reason():
    torch.manual_seed(0)
    tied = nn.Linear(16, 16)
    other = nn.Linear(16, 16)
    other.weight = tied.weight
    layers = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(16, 2),
            "lstm": nn.LSTM(16, 16),
            "groups": nn.Conv2d(16, 16, 3, groups=4),
            "tied": tied,
            "other": other,
            "table": nn.Embedding(16, 16),
            "hooked": nn.Linear(16, 16),
            "tiny": nn.Linear(2, 1),
            "wide": nn.Linear(64, 64),
        }
    )
    layers["hooked"].register_forward_hook(lambda *_: None)
    done = svd(layers)
    outcome = done.recipe.steps[-1].outcome
    assert list(outcome["layers"]) == ["wide"]
    assert outcome["whole"] == {
        "attention": "attention reads its weight without calling it",
        "attention.out_proj": "attention reads its weight without calling it",
        "lstm": "LSTM is no layer that others could take the place of",
        "groups": "its channels are in 4 groups",
        "tied": "its weight is used in several places",
        "table": "Embedding is no layer that others could take the place of",
        "hooked": "it has hooks, which a chain would not call",
        "tiny": "its factors would not be smaller",
    }


def test_what_cannot_be_factorized_is_refused(task):
    with pytest.raises(OptionError, match=r'"weight" of shape \(8, 8\) is stored as affine'):
        svd(rtn(nn.Linear(8, 8)))
    with pytest.raises(
        OptionError, match=r'nothing to factorize: "weight": it is the network itself'
    ):
        svd(nn.Linear(8, 8))
    with pytest.raises(OptionError, match=r"LSTM is no layer that others could"):
        svd(nn.Sequential(nn.LSTM(4, 4)), include="0.*")
    with pytest.raises(OptionError, match=r'"0\.0\.weight" .* is part of a chain already'):
        svd(svd(nn.Sequential(nn.Linear(8, 8))))
    with pytest.raises(OptionError, match=r"keep=0\.1 is less than the smallest ranks"):
        svd(nn.Sequential(nn.Linear(8, 8)), keep=0.1)
    with pytest.raises(TaskError, match="needs inputs to count macs with; pass a task"):
        svd(nn.Sequential(nn.Linear(8, 8)), of="macs")
    with pytest.raises(OptionError, match="its factors would not be smaller"):
        svd(nn.Sequential(nn.Linear(2, 2)))


def test_a_layer_that_is_never_called_stays_whole(task):
    original = net()
    original.add_module("spare", nn.Sequential(nn.Linear(8, 8)))
    original.forward = lambda x: nn.Sequential(*list(original)[:-1])(x)
    done = svd(original, task)
    reason = done.recipe.steps[-1].outcome["whole"]["spare.0"]
    assert reason == "it is not called on calibration inputs"
