"""The networks that examples, tests and benchmarks use, with their published weights.

Each function without arguments (`resnet20`, `resnet8`, `mobilenet_v1`, `stories260k`, `silero_vad`)
returns a pretrained network in evaluation mode, so `examples/zoo.py:resnet20` names a model on the
command line. Weights and data are read from `../shared/data` beside the repository, or from the
folder that the environment variable TERSOR_SHARED_DATA names; the classes need neither.
"""

import heapq
import io
import itertools
import json
import os
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
DATA = Path(os.environ.get("TERSOR_SHARED_DATA", _BESIDE))


def load_weights(name: str) -> dict[str, Tensor]:
    """Reads `weights/<name>.safetensors` of the shared data."""
    return load_file(DATA / "weights" / f"{name}.safetensors")


def _loaded(net: nn.Module, name: str) -> nn.Module:
    net.load_state_dict(load_weights(name))
    return net.eval()


def _buffer(net: nn.Module, name: str, values: Sequence[float]) -> None:
    """Registers per-channel constants that stay out of the state dict."""
    net.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut subsamples and pads channels with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.widens = outputs != inputs
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.widens:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for CIFAR-10 (He et al. 2015, section 4.2), depth 6n + 2.

    x: (batch, 3, 32, 32) in 0..1; normalizing is part of the network
    """

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        super().__init__()
        _buffer(self, "mean", (0.485, 0.456, 0.406))
        _buffer(self, "std", (0.229, 0.224, 0.225))
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        rest = [CifarBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
        return nn.Sequential(CifarBlock(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1((x - self.mean) / self.std)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _halving(x: Tensor) -> Tensor:
    """Pads an even-sized image as Keras does for a 3x3 convolution of stride 2."""
    return functional.pad(x, (0, 1, 0, 1))


class ResNet8(nn.Module):
    """The image-classification reference of MLPerf Tiny (Banbury et al. 2021).

    x: (batch, 3, 32, 32) in 0..1
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2d_1 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv2d_2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv2d_3 = nn.Conv2d(16, 32, 3, stride=2)
        self.conv2d_4 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv2d_5 = nn.Conv2d(16, 32, 1, stride=2)
        self.conv2d_6 = nn.Conv2d(32, 64, 3, stride=2)
        self.conv2d_7 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv2d_8 = nn.Conv2d(32, 64, 1, stride=2)
        self.bn = nn.BatchNorm2d(16, eps=1e-3)
        self.bn_1 = nn.BatchNorm2d(16, eps=1e-3)
        self.bn_2 = nn.BatchNorm2d(16, eps=1e-3)
        self.bn_3 = nn.BatchNorm2d(32, eps=1e-3)
        self.bn_4 = nn.BatchNorm2d(32, eps=1e-3)
        self.bn_5 = nn.BatchNorm2d(64, eps=1e-3)
        self.bn_6 = nn.BatchNorm2d(64, eps=1e-3)
        self.dense = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.conv2d(x * 255)))
        out = functional.relu(self.bn_1(self.conv2d_1(x)))
        x = functional.relu(x + self.bn_2(self.conv2d_2(out)))
        out = functional.relu(self.bn_3(self.conv2d_3(_halving(x))))
        x = functional.relu(self.conv2d_5(x) + self.bn_4(self.conv2d_4(out)))
        out = functional.relu(self.bn_5(self.conv2d_6(_halving(x))))
        x = functional.relu(self.conv2d_8(x) + self.bn_6(self.conv2d_7(out)))
        return self.dense(x.mean((2, 3)))


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al. 2017) of width `alpha`, padded and named as in Keras.

    x: (batch, 3, height, width) in 0..1, sides a multiple of 32 (224 for the full-size network)
    """

    # (output channels at alpha = 1, stride) of each depthwise-separable block
    blocks = (
        *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
        *((512, 1),) * 5,
        *((1024, 2), (1024, 1)),
    )

    def __init__(self, alpha: float = 1.0, classes: int = 1000) -> None:
        super().__init__()
        channels = int(32 * alpha)
        self.conv1 = nn.Conv2d(3, channels, 3, 2, bias=False)
        self.conv1_bn = nn.BatchNorm2d(channels, eps=1e-3)
        for index, (width, stride) in enumerate(self.blocks, 1):
            outputs, padding = int(width * alpha), 1 if stride == 1 else 0
            depthwise = nn.Conv2d(
                channels, channels, 3, stride, padding, groups=channels, bias=False
            )
            self.add_module(f"conv_dw_{index}", depthwise)
            self.add_module(f"conv_dw_{index}_bn", nn.BatchNorm2d(channels, eps=1e-3))
            self.add_module(f"conv_pw_{index}", nn.Conv2d(channels, outputs, 1, bias=False))
            self.add_module(f"conv_pw_{index}_bn", nn.BatchNorm2d(outputs, eps=1e-3))
            channels = outputs
        self.conv_preds = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self._normal("conv1", _halving(x * 2 - 1))
        for index, (_, stride) in enumerate(self.blocks, 1):
            x = self._normal(f"conv_dw_{index}", _halving(x) if stride == 2 else x)
            x = self._normal(f"conv_pw_{index}", x)
        return self.conv_preds(x.mean((2, 3), keepdim=True)).flatten(1)

    def _normal(self, name: str, x: Tensor) -> Tensor:
        layer, norm = self.get_submodule(name), self.get_submodule(f"{name}_bn")
        return functional.relu6(norm(layer(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the stride sits in the 3x3."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.downsample.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        return functional.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet50(nn.Module):
    """ResNet-50 for 224 x 224 images (He et al. 2015, table 1)."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.layer1 = self._stage(64, 64, 1, 3)
        self.layer2 = self._stage(256, 128, 2, 4)
        self.layer3 = self._stage(512, 256, 2, 6)
        self.layer4 = self._stage(1024, 512, 2, 3)
        self.fc = nn.Linear(2048, classes)

    @staticmethod
    def _stage(inputs: int, width: int, stride: int, blocks: int) -> nn.Sequential:
        rest = [Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)]
        return nn.Sequential(Bottleneck(inputs, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(x, 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class StoriesBlock(nn.Module):
    """A Llama block: grouped-query attention with rotary positions, then a gated feed-forward."""

    def __init__(self, width: int, hidden: int, heads: int, groups: int) -> None:
        super().__init__()
        self.head_width, self.repeats = width // heads, heads // groups
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, groups * self.head_width, bias=False)
        self.wv = nn.Linear(width, groups * self.head_width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normal = self.attention_norm(x)
        query = _rotate(self._heads(self.wq(normal)), cos, sin)
        key = _rotate(self._heads(self.wk(normal)), cos, sin)
        value = self._heads(self.wv(normal))
        key, value = (t.repeat_interleave(self.repeats, 1) for t in (key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.wo(mixed.transpose(1, 2).flatten(2))
        normal = self.ffn_norm(x)
        return x + self.w2(functional.silu(self.w1(normal)) * self.w3(normal))

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, length, heads * width) -> (batch, heads, length, width)."""
        return x.unflatten(2, (-1, self.head_width)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of neighbouring features by its position's angle."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Stories(nn.Module):
    """stories260K: a Llama-architecture language model whose output layer is its embedding.

    ids: (batch, length) int64 -> logits (batch, length, 512)
    """

    def __init__(self, vocabulary: int = 512, width: int = 64, layers: int = 5) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(StoriesBlock(width, 172, 8, 4) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.output.weight = self.tok_embeddings.weight
        self.head_width = width // 8

    def forward(self, ids: Tensor) -> Tensor:
        steps = torch.arange(0, self.head_width, 2, device=ids.device) / self.head_width
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        angles = positions[:, None] * 10000.0**-steps
        cos, sin = angles.cos(), angles.sin()
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.output(self.norm(x))


class StoriesTokenizer:
    """Byte-pair encoding with scores: the best-scored neighbouring pair merges first."""

    def __init__(self) -> None:
        path = DATA / "weights" / "stories260K_config_tokenizer.json"
        stored = json.loads(path.read_text(encoding="utf-8"))
        self.pieces = [piece.encode("latin1") for piece in stored["pieces_latin1_bytes"]]
        self.scores: list[float] = stored["scores"]
        # The first of equal pieces wins.
        self.index = {piece: i for i, piece in reversed(list(enumerate(self.pieces)))}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` after the start-of-story token (1)."""
        tokens = [self.index[b" "]]
        for character in text:
            code = character.encode()
            # Pieces 3..258 stand for single bytes.
            tokens += [self.index[code]] if code in self.index else [byte + 3 for byte in code]
        return [1, *self._merged(tokens)]

    def _merged(self, tokens: list[int]) -> list[int]:
        right = [*range(1, len(tokens)), -1]
        left = [*range(-1, len(tokens) - 1)]
        queue: list[tuple[float, int, int, int]] = []

        def offer(at: int) -> None:
            if at >= 0 and right[at] >= 0:
                pair = tokens[at], tokens[right[at]]
                merged = self.index.get(self.pieces[pair[0]] + self.pieces[pair[1]])
                if merged is not None:
                    heapq.heappush(queue, (-self.scores[merged], at, *pair))

        for at in range(len(tokens)):
            offer(at)
        while queue:
            _, at, first, second = heapq.heappop(queue)
            after = right[at]
            # Skip pairs that a better merge has taken apart since they were offered.
            if after < 0 or (tokens[at], tokens[after]) != (first, second):
                continue
            tokens[at] = self.index[self.pieces[first] + self.pieces[second]]
            tokens[after], right[at] = -1, right[after]
            if right[at] >= 0:
                left[right[at]] = at
            offer(at)
            offer(left[at])
        return [token for token in tokens if token >= 0]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; the start-of-story token reads as nothing."""
        codes = (bytes([i - 3]) if 3 <= i < 259 else self.pieces[i] for i in ids if i != 1)
        return b"".join(codes).decode(errors="replace")


class SileroVad(nn.Module):
    """Silero voice activity detector, 16 kHz: one 32 ms frame per call, state passed along.

    x: (batch, 576) = the last 64 samples of the frame before, then 512 new ones
    h, c: (batch, 128) -> probability of speech (batch,), next h, next c
    """

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, 1, 1)
        self.conv2 = nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3 = nn.Conv1d(64, 64, 3, 2, 1)
        self.conv4 = nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spectrum = self.stft_conv(functional.pad(x[:, None], (0, 64), mode="reflect"))
        x = (spectrum[:, :129] ** 2 + spectrum[:, 129:] ** 2).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = functional.relu(layer(x))
        h, c = self.lstm_cell(x[..., 0], (h, c))
        return self.final_conv(functional.relu(h)[..., None]).flatten().sigmoid(), h, c


def resnet20() -> nn.Module:
    """ResNet-20 trained on CIFAR-10: 91.64 % on the 1,017 lossless test images."""
    return _loaded(CifarResNet(20), "resnet20_cifar10")


def resnet56() -> nn.Module:
    """ResNet-56 trained on CIFAR-10: 92.72 % on the 1,017 lossless test images."""
    return _loaded(CifarResNet(56), "resnet56_cifar10")


def resnet8() -> nn.Module:
    """ResNet-8 of MLPerf Tiny: 88.00 % on the 1,017 lossless test images."""
    return _loaded(ResNet8(), "mlperftiny_resnet8_cifar10")


def mobilenet_v1() -> nn.Module:
    """MobileNetV1 0.25 for 128 x 128 images: 47.3 % on the 1,000 ImageNet samples."""
    return _loaded(MobileNetV1(0.25), "mobilenetv1_025_128_imagenet")


def stories260k() -> nn.Module:
    """stories260K: perplexity 3.893 on `story_ids()`."""
    net, weights = Stories(), load_weights("stories260K")
    net.load_state_dict({**weights, "output.weight": weights["tok_embeddings.weight"]})
    return net.eval()


def silero_vad() -> nn.Module:
    """Silero VAD at 16 kHz."""
    return _loaded(SileroVad(), "silero_vad_16k")


def cifar10(split: str = "test") -> tuple[Tensor, Tensor]:
    """Lossless CIFAR-10 images in 0..1 and labels: 1,017 for "test", 8,068 for "train"."""
    with np.load(DATA / "cifar10_lossless_subset.npz") as arrays:
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()


def cifar10_jpeg(split: str = "test") -> tuple[Tensor, Tensor]:
    """CIFAR-10 in 0..1, JPEG-coded, and labels: all 10,000 for "test", 50,000 for "train".

    The pretrained networks lose about ten points on them.
    """
    files = ["test"] if split == "test" else ["train_1of2", "train_2of2"]
    parts = [_jpegs(DATA / f"cifar10_jpeg_{name}.npz") for name in files]
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _jpegs(path: Path) -> tuple[Tensor, Tensor]:
    """(n, 3, height, width) in 0..1, all of one size, and labels."""
    with np.load(path) as arrays:
        coded, offset, labels = arrays["jpeg"], arrays["offset"], arrays["y"]
    return torch.stack(
        [_picture(coded[a:b]) for a, b in itertools.pairwise(offset.tolist())]
    ), torch.from_numpy(labels).long()


def _picture(coded: np.ndarray) -> Tensor:
    """(3, height, width) in 0..1. coded: a JPEG file, as bytes"""
    from PIL import Image

    pixels = np.array(Image.open(io.BytesIO(coded.tobytes())).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def imagenet(count: int = 1000, size: int = 224) -> tuple[Tensor, Tensor]:
    """The first `count` ImageNet samples in 0..1, resized to `size`, and their labels."""
    with np.load(DATA / "imagenet_samples_1000.npz") as arrays:
        coded, offset, labels = arrays["jpeg"], arrays["offset"], arrays["y"][:count]
    images = torch.empty(count, 3, size, size)
    for i in range(count):
        pixels = _picture(coded[offset[i] : offset[i + 1]])[None]
        if size != pixels.shape[-1]:
            pixels = functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
        images[i] = pixels[0]
    return images, torch.from_numpy(labels).long()


def story_ids(count: int = 150) -> list[Tensor]:
    """Token ids (at most 512 each) of the last `count` whole stories of the TinyStories sample."""
    text = (DATA / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    tokenizer = StoriesTokenizer()
    # The sample ends inside a story.
    return [torch.tensor(tokenizer.encode(story)[:512]) for story in stories[-count - 1 : -1]]


def speech_frames() -> tuple[Tensor, Tensor]:
    """One minute of speech as (1875, 576) frames, and Silero's own (1875,) probabilities."""
    with wave.open(str(DATA / "audio" / "silero_test_16k.wav")) as recording:
        pcm = np.frombuffer(recording.readframes(recording.getnframes()), np.int16)
    samples = torch.from_numpy(pcm.astype(np.float32) / 32768)
    frames = functional.pad(samples, (64, 0)).unfold(0, 576, 512)
    reference = np.load(DATA / "audio" / "silero_test_16k_reference_probs.npy")
    return frames.contiguous(), torch.from_numpy(reference).flatten()
