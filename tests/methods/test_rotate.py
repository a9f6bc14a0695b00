"""Rotations folded into weights: outputs stay as they were, what is unknown is refused."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import zoo
from tersor.errors import OptionError, TaskError
from tersor.forms.rotated import turn
from tersor.methods import run
from tersor.methods.quantize.rtn import rtn
from tersor.methods.transform.rotate import rotate
from tersor.task import classification


class Block(nn.Module):
    """Pre-norm attention with heads 4 wide that share their values in pairs, then a gate."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(12), nn.RMSNorm(12)
        self.query, self.key, self.value = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(12, 8)
        self.output = nn.Linear(16, 12)
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        normal = self.first(x)
        query, key, value = (
            layer(normal).unflatten(-1, (-1, 4)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        value = value.repeat_interleave(2, 1)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query @ key.transpose(2, 3) / 2).softmax(-1) @ value
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        normal = self.second(x)
        return x + self.down(functional.silu(self.gate(normal)) * self.up(normal))


class Net(nn.Module):
    def __init__(self, fused: bool = True, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.blocks = nn.ModuleList(Block(fused) for _ in range(2))
        self.norm = nn.RMSNorm(12)
        self.head = nn.Linear(12, 30, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).mean(1)


def made(kind=Net, **options):
    torch.manual_seed(3)
    net = kind(**options).eval()
    for norm in (m for m in net.modules() if isinstance(m, nn.RMSNorm)):
        norm.weight.data.uniform_(0.2, 3)
    return net


def ids(n, seed=0):
    return torch.randint(30, (n, 7), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def task():
    return classification(calibration=ids(32), holdout=ids(16, 1))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("residual", "values"), [(True, False), (False, True), (True, True)])
def test_a_rotated_network_computes_the_same(fused, tied, residual, values, task):
    net = made(fused=fused, tied=tied)
    before = copy.deepcopy(net)
    rotate(net, task, residual=residual, values=values)
    with torch.no_grad():
        assert torch.allclose(net(ids(9, 5)), before(ids(9, 5)), rtol=1e-4, atol=1e-5)
    outcome = net.recipe.steps[0].outcome
    assert outcome["error"] < 1e-5
    assert outcome["norms"] == (5 if residual else 0)
    assert outcome["attentions"] == (2 if values else 0)
    assert outcome["untied"] == (1 if tied and residual else 0)
    block, was = net.blocks[0], before.blocks[0]
    assert torch.equal(block.query.weight, was.query.weight) == (not residual)
    assert not torch.equal(block.output.weight, was.output.weight)
    if residual:
        assert all((m.weight == 1).all() for m in net.modules() if isinstance(m, nn.RMSNorm))


def test_the_stream_itself_is_turned(task):
    # Whatever the seed: what flows is a rotation of what flowed, token by token.
    net = made()
    x = net.embedding(ids(4)).detach()
    rotate(net, task, values=False, generator=11)
    seed = int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(11)))
    assert torch.allclose(net.embedding(ids(4)), turn(x, seed), atol=1e-5)


def test_a_loud_channel_becomes_quiet(task):
    net = made()
    net.embedding.weight.data[:, 3] += 20
    loudness = lambda w: float(w.abs().max() / w.square().mean().sqrt())  # noqa: E731
    before = loudness(net.embedding.weight.detach())
    rotate(net, task)
    assert loudness(net.embedding.weight.detach()) < 0.75 * before


class Attention(nn.Module):
    """Post-norm, with torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm = nn.LayerNorm(12)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.norm(x + self.attention(x, x, x)[0]).mean(1)


def test_attention_of_torch_is_rotated_within_its_heads(task):
    net = made(Attention)
    net.attention.in_proj_bias.data.normal_()
    before = copy.deepcopy(net)
    rotate(net, task)
    assert net.recipe.steps[0].outcome["attentions"] == 1
    with torch.no_grad():
        assert torch.allclose(net(ids(9, 5)), before(ids(9, 5)), atol=1e-5)
    # Queries and keys are as they were.
    now, was = net.attention.in_proj_weight, before.attention.in_proj_weight
    assert torch.equal(now[:24], was[:24])
    assert torch.allclose(now[24:28].T @ now[24:28], was[24:28].T @ was[24:28], atol=1e-5)


class Odd(Net):
    """The stream is read by something else, too."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks[0](self.embedding(ids))
        return self.head(self.norm(x * x.sigmoid())).mean(1)


class Peeked(Net):
    """What a norm gives is read by something else, too."""

    def forward(self, ids: Tensor) -> Tensor:
        normal = self.norm(self.embedding(ids))
        return (self.head(normal) + normal.relu().sum(-1, keepdim=True)).mean(1)


def test_what_is_unknown_is_refused_and_left_as_it_was(task):
    for kind, said in (
        (Odd, r"the residual stream cannot be rotated: (mul|sigmoid)"),
        (Peeked, 'relu reads what "norm" gives'),
    ):
        net = made(kind)
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(OptionError, match=said):
            rotate(net, task)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    net = made()
    rtn(net, include="blocks.0.query")
    with pytest.raises(OptionError, match=r'"blocks.0.query".* have no plain weight of their own'):
        rotate(net, task)
    assert net.head.weight is net.embedding.weight
    with pytest.raises(OptionError, match="neither a residual stream with RMS norms nor"):
        rotate(nn.Sequential(nn.Embedding(30, 4), nn.Flatten(), nn.Linear(28, 3)), task)
    with pytest.raises(TaskError, match="pass a task"):
        rotate(made())


def test_what_is_not_chosen_with_all_its_layers_is_left_alone(task):
    net = made()
    before = copy.deepcopy(net)
    rotate(net, task, exclude=["blocks.1.up", "blocks.0.value"])
    outcome = net.recipe.steps[0].outcome
    assert (outcome["norms"], outcome["attentions"]) == (0, 1)
    changed = {
        name for name, p in net.named_parameters() if not torch.equal(p, before.get_parameter(name))
    }
    assert changed == {"blocks.1.value.weight", "blocks.1.value.bias", "blocks.1.output.weight"}


def test_rotating_twice_is_refused(task):
    net = run(made(), [{"method": "transform.rotate"}], task)
    with pytest.raises(OptionError, match="rotated already"):
        run(net, [{"method": "transform.rotate"}], task)


@pytest.mark.skipif(not zoo.DATA.exists(), reason="needs the shared data")
def test_a_llama_computes_the_same_after_rotation():
    import stories

    net = zoo.stories260k()
    tokens = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = net(tokens)
        rotate(net, stories.task(2))
        assert net.recipe.steps[0].outcome["norms"] == 11
        assert net.recipe.steps[0].outcome["attentions"] == 5
        assert (net(tokens) - before).abs().max() <= 1e-4 * before.abs().max()
