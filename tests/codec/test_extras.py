"""Grids, scalings and folded norms in files: rebuilt with and without code, or refused."""

import pytest
import torch
from torch import nn

from attacks.forge import Pieces
from tersor.codec import load, read_header, save
from tersor.errors import FileError
from tersor.forms import Affine
from tersor.forms.grid import DynamicGrid, Grid
from tersor.forms.scaling import Scaling
from tersor.surgery import fold, hold
from tersor.surgery.grids import grid_of, grids, put, put_scaling, remove, scaling_of
from tersor.surgery.walk import check_finite


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 2),
    )  # fmt: skip
    model.train()(images(8))
    return model.eval()


def images(n):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def quantized():
    """With everything that a file can say beside tensors."""
    model = net()
    fold(model, images(2))
    shared = Grid.spanning(-3, 3)
    put(model[0], "input", Grid(0.25, -3, bits=4, signed=True))
    put(model[2], "output", Grid.spanning(0, 2))
    put_scaling(model[4], Scaling(torch.rand(16) + 0.5))
    put(model[4], "input", shared)
    put(model[5], "input", shared)
    put(model[6], "input", DynamicGrid(per_row=True))
    hold(model[4], "weight", Affine.encode(model[4].weight, bits=8))
    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(quantized(), tmp_path_factory.mktemp("extras") / "net.tersor", example=images(2))


def test_a_file_gives_them_back_with_and_without_code(path):
    expected = quantized()(images(5))
    for loaded in (load(path), load(path, into=net()), load(path, into=quantized())):
        assert torch.equal(loaded(images(5)), expected)
    model = load(path, into=net())
    assert [where for _, where, _, _ in grids(model)] == ["input", "output", *["input"] * 3]
    assert grid_of(model[4], "input") is grid_of(model[5], "input")
    assert (grid_of(model[0], "input").bits, grid_of(model[0], "input").signed) == (4, True)
    assert grid_of(model[6], "input").per_row
    assert torch.equal(scaling_of(model[4]).factor, scaling_of(quantized()[4]).factor)
    assert model.state_dict().keys() == quantized().state_dict().keys()


def test_what_was_loaded_makes_the_same_file_again(path, tmp_path):
    for number, loaded in enumerate((load(path), load(path, into=net()))):
        example = images(2) if number else None
        again = save(loaded, tmp_path / f"{number}.tersor", example=example)
        assert again.read_bytes() == path.read_bytes()


def test_the_header_says_where_they_sit(path):
    kinds = {entry.names[0].rpartition(".")[0]: entry.layer for entry in read_header(path).entries}
    assert kinds["0.input_grid"] == "grid s4"
    assert kinds["2.output_grid"] == "grid u8"
    assert kinds["4.input_scaling"] == "scaling"
    assert kinds["6.input_grid"] == "dynamic grid per row"
    assert kinds["1"] == "folded norm"
    tied = {entry.names for entry in read_header(path).entries if len(entry.names) > 1}
    assert ("4.input_grid.scale", "5.input_grid.scale") in tied


def test_a_module_that_they_do_not_fit_is_refused_and_stays_as_it_was(path):
    for make, said in [
        (lambda: nn.Sequential(*list(net())[:6]), r'lacks "6", "6.bias"'),
        # A norm that the module never had cannot have been folded.
        (
            lambda: nn.Sequential(net()[0], nn.Identity(), *list(net())[2:]),
            'lacks "1", which the file',
        ),
    ]:
        model = make()
        before = list(model.state_dict())
        with pytest.raises(FileError, match=said):
            load(path, into=model)
        assert list(model.state_dict()) == before
        assert not list(grids(model))
    plain = save(net(), path.with_name("plain.tersor"))
    with pytest.raises(FileError, match=r'the file lacks "0\.bias", "0\.input_grid'):
        load(plain, into=quantized())


def renamed(path, old, new):
    """Another header: the module called `old` gets the row `new`."""
    pieces = Pieces.of(path)
    rows = pieces.header["modules"]
    at = next(n for n, row in enumerate(rows) if row[0] == old)
    rows[at] = new(rows[at])
    return pieces.write(path.with_name("forged.tersor"))


@pytest.mark.parametrize("child", ["input_grid", "input_scaling"])
def test_nothing_sits_on_a_grid_or_on_a_scaling(path, child):
    # A module that has them already lacks nothing that such a file speaks of.
    for old, owner in (("6.input_grid", "4.input_grid"), ("6.input_grid", "4.input_scaling")):
        kind = "scaling" if child == "input_scaling" else "dynamic grid per row"
        leaf = "factor" if child == "input_scaling" else "levels"

        def row(given, owner=owner, kind=kind, leaf=leaf):
            return [f"{owner}.{child}", kind, {leaf: given[2]["levels"]}]

        model = quantized()
        remove(model[6], "input")
        before = model[4].input_scaling
        with pytest.raises(FileError, match=r"sits on no layer|belongs to no layer"):
            load(renamed(path, old, row), into=model)
        assert model[4].input_scaling is before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("0.input_grid", lambda r: [r[0], "grid u8", r[2]], "integers 0..255"),
        ("0.input_grid", lambda r: [*r[:2], {"zero": r[2]["scale"], "scale": r[2]["zero"]}], "one"),
        ("0.input_grid", lambda r: ["0.inside", *r[1:]], "sits on no layer"),
        ("0.input_grid", lambda r: ["2.output_grid.input_grid", *r[1:]], "sits on no layer"),
        ("0.input_grid", lambda r: ["7.input_grid", *r[1:]], 'lacks "7"'),
        ("4.input_scaling", lambda r: ["4.scaling", *r[1:]], "belongs to no layer"),
        ("4.input_scaling", lambda r: [r[0], "grid u8", r[2]], "buffers"),
        ("1", lambda r: ["3", *r[1:]], 'lacks "3"'),
        ("4", lambda r: [r[0], "folded norm", r[2]], "has values|lacks"),
    ],
)
def test_hostile_ones_are_refused(path, old, new, said):
    model = net()
    with pytest.raises(FileError, match=said):
        load(renamed(path, old, new), into=model)
    check_finite(model)
    assert not list(grids(model))
