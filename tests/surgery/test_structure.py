"""What was changed beside tensors is done again to a fresh network, and nothing else is."""

import copy
import pickle

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from surgery.test_couple import GPT2, IDS, MODELS, answer, calm, drawn
from tersor.codec import load, read_header, save
from tersor.errors import FileError, ModelError
from tersor.methods import run
from tersor.methods.quantize.rtn import rtn
from tersor.surgery.coupling import couple
from tersor.surgery.cut import cut
from tersor.surgery.skip import Skipped, returned, skip
from tersor.surgery.structure import Structure, note, structure_of
from tersor.task import classification


def small(name: str) -> tuple[nn.Module, Tensor]:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = calm(build())
    coupling = couple(model, inputs)
    cut(model, inputs, coupling, drawn(coupling, 0.5, mixed=True))
    return model, inputs


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_network_goes_into_a_fresh_one_of_its_class(name, tmp_path):
    model, inputs = small(name)
    path = save(model, tmp_path / "small.tersor", graph=False)
    torch.manual_seed(1)
    fresh = load(path, into=calm(MODELS[name][0]()))
    assert torch.equal(answer(fresh, inputs), answer(model, inputs))
    assert structure_of(fresh) == structure_of(model)


def test_a_cut_and_quantized_network_too(tmp_path):
    model, inputs = small("gpt2")
    rtn(model, bits=8)
    fresh = load(save(model, tmp_path / "small.tersor", graph=False), into=MODELS["gpt2"][0]())
    assert torch.equal(answer(fresh, inputs), answer(model, inputs))


def test_it_goes_through_a_file_without_code_and_on_to_the_next(tmp_path):
    model, inputs = small("gpt2")
    path = save(model, tmp_path / "small.tersor", example=inputs)
    again = save(load(path), tmp_path / "again.tersor", graph=False)
    assert read_header(again).structure == read_header(path).structure != {}
    assert torch.equal(answer(load(again, into=MODELS["gpt2"][0]()), inputs), answer(model, inputs))


def test_a_network_that_was_not_cut_must_have_the_shapes_of_the_file(tmp_path):
    path = save(nn.Linear(4, 3), tmp_path / "small.tersor", graph=False)
    assert read_header(path).structure == {}
    with pytest.raises(FileError, match=r'"weight" has shape \(3, 4\) in the file and \(3, 5\)'):
        load(path, into=nn.Linear(5, 3))


@pytest.mark.parametrize("made_by", ["svd", "tensor_train"])
def test_a_cut_network_of_chains_too(made_by, tmp_path):
    def wide() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Linear(32, 128), nn.ReLU()), *(nn.Linear(128, 64), nn.ReLU()), nn.Linear(64, 16)
        ).eval()

    x = torch.randn(64, 32)
    steps = [
        {"method": "cut.channels", "options": {"keep": 0.6}},
        {"method": f"factorize.{made_by}", "options": {"keep": 0.6}},
    ]
    done = run(wide(), steps, classification(calibration=x, holdout=x[:8]))
    assert structure_of(done).chains
    path = save(done, tmp_path / "small.tersor", graph=False)
    assert torch.equal(answer(load(path, into=wide()), x), answer(done, x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def tower() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), Block(), Block(), Block(), nn.Linear(6, 2))


def forged(tmp_path, structure: dict[str, object]) -> object:
    """A file of a network like `tower`, which says that of itself."""
    model = tower()
    note(model, Structure.from_json(structure))
    return save(model, tmp_path / "forged.tersor", graph=False)


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        ({"skipped": {"9": 0}}, 'there is no block "9" to skip'),
        ({"skipped": {"": 0}}, 'there is no block "" to skip'),
        ({"numbers": {"9": {"heads": 2}}}, 'there is no module "9"'),
        ({"numbers": {"1": {"tails": 2}}}, '"tails" of "1" is None and cannot become 2'),
        ({"numbers": {"1": {"heads": 5}}}, '"heads" of "1" is 4 and cannot become 5'),
        ({"numbers": {"1": {"training": 1}}}, '"training" of "1" is True and cannot become 1'),
        ({"numbers": {"1": {"forward": 1}}}, '"forward" of "1" is None and cannot become 1'),
    ],
)
def test_a_file_that_asks_for_what_there_is_not_is_refused(structure, reason, tmp_path):
    fresh = tower()
    before = copy.deepcopy(fresh)
    with pytest.raises(FileError, match=reason):
        load(forged(tmp_path, structure), into=fresh)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in before.state_dict().items())
    assert fresh[1].heads == 4


def test_a_file_that_asks_for_larger_tensors_is_refused(tmp_path):
    model = nn.Linear(4, 8)
    note(model, Structure(cut=True))
    path = save(model, tmp_path / "large.tersor", graph=False)
    with pytest.raises(FileError, match=r'"bias" of shape \(3,\) cannot .* cut to \(8,\)'):
        load(path, into=nn.Linear(4, 3))


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"holes": 1},
        {"cut": False},
        {"cut": 1},
        {"numbers": []},
        {"numbers": {"1": 3}},
        {"numbers": {"1": {"heads": "2"}}},
        {"numbers": {"1": {"heads": -2}}},
        {"numbers": {"1": {"heads": True}}},
        {"chains": {"1": "low_rank"}},
        {"chains": {"1": ["low_rank", [2**40]]}},
        {"skipped": {"1": None}},
    ],
)
def test_what_is_no_structure_is_refused(data):
    with pytest.raises(ModelError, match="the structure does not fit"):
        Structure.from_json(data)


def test_structure_comes_back_from_json():
    structure = Structure(True, {"a.b": {"heads": 2}}, {"c": ("tucker", (3, 4))}, {"d": 1})
    assert Structure.from_json(structure.as_json()) == structure
    assert Structure().as_json() == {}


def test_what_lies_inside_a_skipped_block_is_forgotten():
    model = tower()
    note(model, Structure(True, {"1": {"heads": 2}, "2": {"heads": 2}}))
    note(model, Structure(skipped={"1": 0}))
    assert structure_of(model) == Structure(True, {"2": {"heads": 2}}, {}, {"1": 0})


def test_a_skipped_block_hands_on_what_it_is_given(tmp_path):
    model, x = tower(), torch.randn(5, 4)
    first, _, third, fourth, last = model
    with torch.no_grad():
        wanted = last(fourth(third(first(x))))
    skip(model, {"1": 0})
    assert torch.equal(answer(model, x), wanted)
    assert model[1].heads == 4
    assert not list(model[1].parameters())
    for other in (
        load(save(model, tmp_path / "a.tersor", graph=False), into=tower()),
        load(save(model, tmp_path / "b.tersor", example=x)),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ):
        assert torch.equal(answer(other, x), wanted)


class Telling(Block):
    """Says something beside, as blocks of transformers do with their attention."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class Unpacking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Telling(), Telling()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return x


def test_a_block_that_returns_a_tuple_still_does():
    model, x = Unpacking(), torch.randn(3, 6)
    wanted = model.blocks[0](x)[0]
    assert torch.equal(answer(skip(model, {"blocks.1": 2}), x), wanted)


def test_a_skipped_block_of_a_transformer_is_as_if_it_were_not_there():
    model = hf.GPT2Model(hf.GPT2Config(**GPT2)).eval()
    shorter = copy.deepcopy(model)
    del shorter.h[0]
    skip(model, {"h.0": 0})
    assert torch.equal(answer(model, IDS), answer(shorter, IDS))


def test_only_a_block_that_keeps_shape_and_type_can_be_skipped():
    x = torch.randn(2, 3)
    assert returned(x, x + 1) == 0
    assert returned(x, (x + 1,)) == 1
    assert returned(x, (x + 1, None)) == 2
    assert returned(x, (x + 1, x)) is None
    assert returned(x, x[:1]) is None
    assert returned(x, x.double()) is None
    assert returned(None, x) is None
    assert Skipped(nn.ReLU(), 2)(x)[1] is None
