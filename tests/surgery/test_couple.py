"""What can be cut together, and that the network computes the same without it."""

import copy
import random

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import zoo
from surgery.structures import IMAGE, NETS
from tersor.codec import load, save
from tersor.errors import ModelError
from tersor.export import OnnxModel, to_onnx
from tersor.forms import Affine
from tersor.measure import macs
from tersor.surgery import walk
from tersor.surgery.coupling import Coupling, Unit, couple
from tersor.surgery.cut import cut
from tersor.surgery.proving import cuttable

IDS, PICTURE = torch.arange(32).reshape(2, 16) * 3 % 90, torch.randn(2, 3, 64, 64)
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"num_hidden_layers": 2, "vocab_size": 100}
VISION = {key: SIZES[key] for key in [*SIZES][:4]} | {"image_size": 64, "patch_size": 16}
WHISPER = {
    f"{side}_{what}": 2 if what == "layers" else 4
    for side in ("encoder", "decoder")
    for what in ("layers", "attention_heads")
}
WHISPER |= {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 100}
WHISPER |= {"num_mel_bins": 16, "max_source_positions": 20, "pad_token_id": 0}
WHISPER |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
STAGES = {"embedding_size": 8, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 100, "n_positions": 32}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
MODELS = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**SIZES)), IDS),
    "gpt2": (lambda: hf.GPT2Model(hf.GPT2Config(**GPT2)), IDS),
    "llama": (
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)
        ),
        IDS,
    ),
    "t5": (lambda: hf.T5EncoderModel(hf.T5Config(**T5)), IDS),
    "whisper": (
        lambda: hf.WhisperModel(hf.WhisperConfig(**WHISPER)).encoder,
        torch.randn(2, 16, 40),
    ),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**VISION)), PICTURE),
    "swin": (lambda: hf.SwinModel(hf.SwinConfig(**SWIN, window_size=4)), PICTURE),
    "convnext": (
        lambda: hf.ConvNextModel(
            hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=64)
        ),
        PICTURE,
    ),
    "resnet": (lambda: hf.ResNetModel(hf.ResNetConfig(**STAGES)), PICTURE),
    "regnet": (lambda: hf.RegNetModel(hf.RegNetConfig(**STAGES, groups_width=8)), PICTURE),
    "mobilenet v1": (
        lambda: hf.MobileNetV1Model(hf.MobileNetV1Config(depth_multiplier=0.25, image_size=64)),
        PICTURE,
    ),
    "mobilenet v2": (
        lambda: hf.MobileNetV2Model(hf.MobileNetV2Config(depth_multiplier=0.35, image_size=64)),
        PICTURE,
    ),
    "efficientnet": (
        lambda: hf.EfficientNetModel(
            hf.EfficientNetConfig(
                width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, image_size=64
            )
        ),
        PICTURE,
    ),
    **NETS,
}
REAL = {
    "resnet20": (zoo.resnet20, IMAGE),
    "resnet8": (zoo.resnet8, IMAGE),
    "mobilenet": (zoo.mobilenet_v1, torch.randn(2, 3, 96, 96)),
    "stories": (zoo.stories260k, IDS),
}


def calm(model: nn.Module) -> nn.Module:
    """With batch norms that neither blow up nor vanish, whatever the weights are."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def drawn(coupling: Coupling, share: float, mixed: bool) -> list[Unit]:
    lots, found = random.Random(0), []
    for group in coupling.groups:
        if mixed or not group.units[0].mixed:
            found += lots.sample(group.units, max(1, int(share * len(group.units))))
    return found


def zeroed(model: nn.Module, units: list[Unit]) -> nn.Module:
    other = copy.deepcopy(model)
    tensors = dict(other.named_parameters()) | dict(other.named_buffers())
    with torch.no_grad():
        for unit in units:
            for (name, dim), indices in unit.slices.items():
                tensors[name].index_fill_(dim, torch.tensor(indices), 0)
    return other


def answer(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        found = model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    if isinstance(found, tuple):
        return found[0]
    return found if isinstance(found, Tensor) else next(iter(found.values()))


def counted(model: nn.Module, small: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> None:
    """A layer's multiply-adds go with the elements of its weight."""
    before, after = macs(model, inputs), macs(small, inputs)
    assert after.total < before.total
    for path, count in after.by_layer.items():
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            elements = [m.get_submodule(path).weight.numel() for m in (model, small)]
            assert count * elements[0] == before.by_layer[path] * elements[1]


def check(model: nn.Module, inputs: Tensor | tuple[Tensor, ...], share: float) -> None:
    coupling = couple(model, inputs)
    assert coupling.groups
    units = drawn(coupling, share, mixed=False)
    wanted, small = answer(zeroed(model, units), inputs), copy.deepcopy(model)
    cut(small, inputs, couple(small, inputs), units)
    found = answer(small, inputs)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert type(small) is type(model)
    counted(model, small, inputs)
    for name, parameter in small.named_parameters():
        gone = [len({i for u in units for i in u.slices.get((name, d), ())}) for d in range(9)]
        sizes = [s - g for s, g in zip(model.get_parameter(name).shape, gone, strict=False)]
        assert list(parameter.shape) == sizes
    # What norms look at as a whole may go as well; the others are then seen differently.
    every = drawn(coupling, share, mixed=True)
    cut(model, inputs, coupling, every)
    assert answer(model, inputs).shape == wanted.shape


@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_a_network_without_units_computes_what_it_does_with_zeros(name, share):
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    check(calm(build()), inputs, share)


@pytest.mark.parametrize("name", REAL)
def test_real_networks_too(name, shared_data):
    build, inputs = REAL[name]
    check(build().eval(), inputs, 0.5)


def test_what_the_code_counts_on_is_found_and_left_alone(shared_data):
    model = zoo.silero_vad().eval()
    inputs = (torch.randn(2, 576), torch.zeros(2, 128), torch.zeros(2, 128))
    assert group_of(couple(model, inputs), "stft_conv.weight", 0)
    coupling = cuttable(model, inputs)
    # The forward pass takes the first 129 channels and the others apart.
    assert "(129) must match" in coupling.left["stft_conv.weight", 0]
    assert [len(group.units) for group in coupling.groups] == [128, 64, 64]
    units = drawn(coupling, 0.5, mixed=False)
    wanted = answer(zeroed(model, units), inputs)
    cut(model, inputs, coupling, units)
    assert (answer(model, inputs) - wanted).abs().max() <= 1e-4


def group_of(coupling: Coupling, name: str, dim: int) -> list[Unit]:
    return [unit for g in coupling.groups for unit in g.units if (name, dim) in unit.slices]


def test_a_head_of_few_keys_goes_with_the_queries_that_share_it():
    build, inputs = MODELS["llama"]
    units = group_of(couple(build(), inputs), "model.layers.0.self_attn.k_proj.weight", 0)
    assert len(units) == 2
    layer = "model.layers.0.self_attn"
    assert units[1].slices == {
        (f"{layer}.q_proj.weight", 0): tuple(range(16, 32)),
        (f"{layer}.k_proj.weight", 0): tuple(range(8, 16)),
        (f"{layer}.v_proj.weight", 0): tuple(range(8, 16)),
        (f"{layer}.o_proj.weight", 1): tuple(range(16, 32)),
    }


def test_shuffled_halves_keep_as_many_channels():
    model = NETS["shuffle"][0]()
    for unit in group_of(couple(model, IMAGE), "head.weight", 1):
        indices = unit.slices["head.weight", 1]
        assert len(indices) % 2 == 0


def test_what_stays_is_listed_with_its_reason():
    coupling = couple(NETS["squeeze"][0](), IMAGE)
    assert coupling.left["last.weight", 0] == "it is an output of the network"
    assert coupling.left["stem.0.weight", 1] == "its inputs are those of the network"
    assert coupling.left["three.weight", 2] == "it is the size of a kernel"


def test_attention_of_torch_keeps_its_width():
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    coupling = couple(model, torch.randn(2, 6, 32))
    assert [len(group.units) for group in coupling.groups] == [64]
    reason = coupling.left["self_attn.in_proj_weight", 0]
    assert reason == "MultiheadAttention of torch ties its width to its heads"


class Stubborn(nn.Module):
    """A number that no module remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).reshape(len(x), 8))


def test_a_network_that_cannot_run_without_them_is_as_it_was():
    model, inputs = Stubborn(), torch.randn(2, 6)
    before, wanted = copy.deepcopy(model.state_dict()), answer(model, inputs)
    coupling = couple(model, inputs)
    with pytest.raises(ModelError, match=r"Stubborn does not run once it is cut: .*invalid for"):
        cut(model, inputs, coupling, list(coupling.groups[0].units[:2]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.first.out_features, model.last.in_features) == (8, 8)
    assert torch.equal(answer(model, inputs), wanted)


class Wordless(nn.Module):
    """Refuses other sizes without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.shape[1] != 8:
            raise AssertionError
        return self.last(x)


def test_a_network_that_fails_without_a_word_is_left_alone():
    model, inputs = Wordless(), torch.randn(2, 6)
    assert couple(model, inputs).groups
    coupling = cuttable(model, inputs)
    assert not coupling.groups
    assert "does not run once it is cut: AssertionError" in coupling.left["first.weight", 0]


def test_a_group_cannot_go_as_a_whole():
    model, inputs = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), torch.randn(2, 6)
    coupling = couple(model, inputs)
    with pytest.raises(
        ModelError, match=r'left of "0\.weight" of shape \(8, 6\) along dimension 0'
    ):
        cut(model, inputs, coupling, list(coupling.groups[0].units))
    assert walk(model)[0].weight.shape == (8, 6)


def test_a_network_that_decides_by_values_is_refused():
    class Deciding(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else super().forward(x)

    with pytest.raises(ModelError, match="cannot be traced, so nothing says what can be cut"):
        couple(Deciding(4, 4), torch.randn(2, 4))


def test_what_a_form_holds_is_not_cut():
    model, inputs = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), torch.randn(2, 6)
    coupling = couple(model, inputs)
    walk(model)[1].hold(Affine.encode(walk(model)[1].weight, bits=4))
    with pytest.raises(ModelError, match=r'"1\.weight" is held by a form'):
        cut(model, inputs, coupling, list(coupling.groups[0].units[:1]))


@pytest.mark.parametrize("name", ["queries", "grouped", "unet", "recurrent", "shuffle", "gpt2"])
def test_a_cut_network_is_written_read_and_exported_as_any_other(name, tmp_path):
    build, inputs = {**MODELS, **NETS}[name]
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    torch.manual_seed(0)
    model = calm(build())
    coupling = couple(model, inputs)
    cut(model, inputs, coupling, drawn(coupling, 0.5, mixed=True))
    wanted = answer(model, inputs)
    path = save(model, tmp_path / "small.tersor", example=inputs)
    assert (answer(load(path), inputs) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    onnx = OnnxModel(to_onnx(model, tmp_path / "small.onnx", example=inputs).path)
    assert (answer(onnx, inputs) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
