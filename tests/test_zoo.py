"""The networks of examples/zoo.py give the published figures, so tests on them mean something."""

import math

import pytest
import torch
from torch.nn import functional

import zoo


def accuracy(net, images, labels, top=1):
    with torch.inference_mode():
        hits = [
            (net(images[i : i + 100]).topk(top, 1)[1] == labels[i : i + 100, None]).any(1)
            for i in range(0, len(images), 100)
        ]
    return 100 * torch.cat(hits).double().mean().item()


@pytest.mark.parametrize(
    ("factory", "published"),
    [(zoo.resnet20, 91.64), (zoo.resnet56, 92.72), (zoo.resnet8, 88.00)],
)
def test_cifar_networks_reach_their_accuracy(shared_data, factory, published):
    assert accuracy(factory(), *zoo.cifar10()) == pytest.approx(published, abs=0.01)


def test_mobilenet_reaches_its_top_1_and_top_5(shared_data):
    pytest.importorskip("PIL", reason="the ImageNet samples are JPEG files: needs pillow")
    images, labels = zoo.imagenet(1000, 128)
    net = zoo.mobilenet_v1()
    assert accuracy(net, images, labels) == pytest.approx(47.3, abs=0.11)
    assert accuracy(net, images, labels, top=5) == pytest.approx(71.9, abs=0.11)


def test_stories_reach_their_perplexity(shared_data):
    net, loss, count = zoo.stories260k(), 0.0, 0
    with torch.inference_mode():
        for ids in zoo.story_ids():
            logits = net(ids[None, :-1])[0]
            loss += functional.cross_entropy(logits, ids[1:], reduction="sum").item()
            count += len(ids) - 1
    assert count == 66_658
    assert math.exp(loss / count) == pytest.approx(3.893, abs=5e-4)


def test_tokenizer_gives_the_text_back(shared_data):
    tokenizer = zoo.StoriesTokenizer()
    assert tokenizer.encode("Once upon a time") == [1, 403, 407, 261, 378]
    text = "Once upon a time, Zoë met a 🐉."
    assert tokenizer.decode(tokenizer.encode(text)) == " " + text


def test_voice_detector_follows_its_reference(shared_data):
    frames, reference = zoo.speech_frames()
    net, found = zoo.silero_vad(), []
    h = c = torch.zeros(1, 128)
    with torch.inference_mode():
        for frame in frames[:400]:
            speech, h, c = net(frame[None], h, c)
            found.append(speech)
    assert (torch.cat(found) - reference[:400]).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("net", "parameters"),
    [
        (zoo.MobileNetV1(), 4_231_976),
        (zoo.MobileNetV1(0.25), 470_072),
        (zoo.ResNet50(), 25_557_032),
        (zoo.CifarResNet(20), 269_722),
        (zoo.Stories(), 260_032),
    ],
)
def test_sizes_are_the_published_ones(net, parameters):
    assert sum(tensor.numel() for tensor in net.parameters()) == parameters
