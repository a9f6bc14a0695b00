"""Checkpoints quantized block by block: codes of the whole network, whatever happens between."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tersor
import zoo
from tersor.checkpoints import blockwise, ends, job, needs, quantize_folder, read_tokens
from tersor.checkpoints.blockwise import Alone
from tersor.checkpoints.calls import Call, Stem, check_alike, hidden_in, token_embedding
from tersor.checkpoints.layout import held_names
from tersor.checkpoints.skeleton import blocks_of, skeleton_of
from tersor.checkpoints.source import open_checkpoint
from tersor.checkpoints.weights import Weights
from tersor.codec import read_header
from tersor.errors import ModelError, OptionError, OutputError, TaskError
from tersor.forms import Affine
from tersor.methods.table import TABLE
from tersor.surgery.hold import held
from tersor.task import Task
from tersor.task.data import Fixed

transformers = pytest.importorskip("transformers")
needs_data = pytest.mark.skipif(not zoo.DATA.exists(), reason="needs the shared data")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "head_dim": 8,
}
OPTIONS = {"bits": 4, "group_size": 16}


def network(config=None):
    torch.manual_seed(0)
    config = config or transformers.LlamaConfig(**SIZES)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def saved(folder, model, dtype=torch.float32):
    model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(folder, max_shard_size="20kB")
    return folder


def tokens(sequences=4, length=24):
    return torch.randint(0, 100, (sequences, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama") / "model", network(), torch.bfloat16)


@pytest.fixture
def folder(llama, tmp_path):
    return Path(shutil.copytree(llama, tmp_path / "model"))


def quantized(folder, **given):
    given = {"method": "quantize.rtn", "options": OPTIONS, "calibration": tokens(), **given}
    return quantize_folder(folder, folder.parent / "out.tersor", **given)


@pytest.fixture(scope="module")
def finished(llama, tmp_path_factory):
    """The bytes that runs which nothing stops write, by method."""
    out = tmp_path_factory.mktemp("finished") / "out.tersor"
    return {
        method: quantize_folder(
            llama, out, method=method, options=OPTIONS, calibration=tokens()
        ).path.read_bytes()
        for method in ("quantize.rtn", "quantize.gptq")
    }


def forms_in(path, model):
    """The forms of a file, in a network of the same shape."""
    empty = copy.deepcopy(model)
    tersor.load(path, into=empty)
    return dict(held(empty))


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, form in wanted.items():
        assert torch.equal(found[name].codes, form.codes), name
        assert torch.equal(found[name].scale, form.scale), name


def whole(model, batches, method="quantize.gptq", options=OPTIONS):
    """The forms that a method gives to a network that is in memory as a whole."""
    data = tuple((batch, None) for batch in batches)
    task = Task("language", {}, {"calibration": Fixed(data), "holdout": Fixed(())})
    return dict(held(TABLE[method](copy.deepcopy(model), task, **options)))


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SIZES),
        transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=100, n_positions=64),
        transformers.Gemma3TextConfig(**SIZES, sliding_window=8),
        transformers.OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=100,
            word_embed_proj_dim=32,
        ),
        # It sends the ids to where the embedding is.
        transformers.Llama4TextConfig(**SIZES, num_local_experts=2, intermediate_size_mlp=48),
        # Its blocks give tuples.
        transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=100),
    ],
    ids=lambda config: config.model_type,
)
def test_blocks_one_by_one_give_what_the_network_gives(tmp_path, config):
    model = network(config)
    saved(tmp_path / "model", model)
    empty = skeleton_of(tmp_path / "model")
    assert all(parameter.is_meta for parameter in empty.parameters())
    path, blocks = blocks_of(empty)
    weights = Weights(empty, held_names(open_checkpoint(tmp_path / "model")))
    stem = Stem(empty, path, weights, None)
    hidden, call = stem.first(tokens())

    def loaded(at):
        block = copy.deepcopy(blocks[at]).eval()
        weights.fill(block, f"{path}.{at}")
        return block

    with torch.no_grad():
        tuples = not isinstance(call(loaded(0), hidden), torch.Tensor)
        for at, own in enumerate(stem.calls(tokens(), tuples=tuples)):
            hidden = Alone(f"{path}.{at}", loaded(at), own)(hidden)
        last = []
        model.get_submodule(path)[-1].register_forward_hook(
            lambda module, args, output: last.append(hidden_in(output))
        )
        model(tokens(), use_cache=False)
    assert torch.equal(hidden, last[0])


@pytest.mark.parametrize("method", ["quantize.rtn", "quantize.gptq"])
def test_codes_are_those_of_the_whole_network(tmp_path, method):
    model = network()
    saved(tmp_path / "model", model)
    options = OPTIONS | {"include": "model.layers.*"}
    done = quantized(tmp_path / "model", method=method, options=options)
    assert [block.path for block in done.blocks] == [f"model.layers.{at}" for at in range(3)]
    assert all(0 < block.error < 0.5 for block in done.blocks)
    assert_same(forms_in(done.path, model), whole(model, [tokens()], method, options))
    recipe = read_header(done.path).recipe
    assert [step["method"] for step in recipe] == [method]
    assert recipe[0]["options"]["include"] == "model.layers.*"


def test_ends_are_rounded_to_nearest_and_the_blocks_are_given_what_they_give(tmp_path):
    model = network()
    saved(tmp_path / "model", model)
    done = quantized(tmp_path / "model", method="quantize.gptq", ends=6)
    found = forms_in(done.path, model)
    rounded = copy.deepcopy(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        parameter = rounded.get_parameter(name)
        form = Affine.encode(parameter, bits=6, group_size=16)
        assert torch.equal(found[name].codes, form.codes)
        assert torch.equal(found[name].scale, form.scale)
        del found[name]
        parameter.data = form.dense()
    assert_same(found, whole(rounded, [tokens()], options=OPTIONS | {"include": "model.layers.*"}))


def test_unpacked_it_is_the_checkpoint_with_other_weights(folder):
    done = quantized(folder, ends=None)
    assert done.bytes_after < done.bytes_before / 2
    assert not (folder.parent / "out.tersor.work").exists()
    tersor.unpack(done.path, folder.parent / "back")
    index = "model.safetensors.index.json"
    back, before = (json.loads((f / index).read_text()) for f in (folder.parent / "back", folder))
    assert back == before
    for name, file in before["weight_map"].items():
        new, old = (load_file(f / file)[name] for f in (folder.parent / "back", folder))
        assert new.dtype == old.dtype == torch.bfloat16
        changed = ".layers." in name and "proj" in name
        assert torch.equal(new, old) is not changed
        assert (new - old).float().norm() < 0.2 * old.float().norm()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 3, 4, 7])
def test_stopped_after_any_write_it_goes_on_to_the_same_bytes(folder, finished, monkeypatch, after):
    written = []

    def counted(write):
        def run(path, *args):
            if len(written) == after:
                raise Stopped
            written.append(path)
            write(path, *args)

        return run

    with monkeypatch.context() as patch:
        # Two ends, then states and forms in turn: eight files.
        patch.setattr(ends, "write_part", counted(ends.write_part))
        patch.setattr(blockwise, "write_part", counted(blockwise.write_part))
        patch.setattr(blockwise, "write_states", counted(blockwise.write_states))
        with pytest.raises(Stopped):
            quantized(folder, method="quantize.gptq")
    done = quantized(folder, method="quantize.gptq")
    assert done.path.read_bytes() == finished["quantize.gptq"]


CHILD = """
import sys, torch
from tersor.checkpoints import quantize_folder
tokens = torch.randint(0, 100, (4, 24), generator=torch.Generator().manual_seed(0))

class Lines:
    def plan(self, units): pass
    def advance(self, units=1): pass
    def doing(self, what): print(what, flush=True)

quantize_folder(sys.argv[1], sys.argv[2], method="quantize.rtn",
                options={"bits": 4, "group_size": 16}, calibration=tokens, progress=Lines())
"""


def test_killed_it_goes_on_to_the_same_bytes(folder, finished):
    out = folder.parent / "killed.tersor"
    command = [sys.executable, "-c", CHILD, str(folder), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.startswith("model.layers.0"):
                os.kill(child.pid, signal.SIGKILL)
                break
    assert not out.exists()
    work = folder.parent / "killed.tersor.work"
    assert (work / "block-00000.safetensors").exists()
    told = []

    class Lines:
        def plan(self, units):
            pass

        def advance(self, units=1):
            pass

        def doing(self, what):
            told.append(what)

    quantize_folder(
        folder, out, method="quantize.rtn", options=OPTIONS, calibration=tokens(), progress=Lines()
    )
    assert out.read_bytes() == finished["quantize.rtn"]
    assert not any(line.startswith("model.layers.0") for line in told)
    assert "3 blocks, the largest of 0.00 GB" in told[0]


@pytest.mark.parametrize("after", [2, 4, 6])
def test_killed_while_it_removes_its_work_it_writes_the_same_bytes(
    folder, finished, monkeypatch, after
):
    unlink, removed = Path.unlink, []

    def counted(path, missing_ok=False):
        own = path.parent.name == "out.tersor.work" and not path.name.startswith(".")
        if own and (folder.parent / "out.tersor").exists():
            if len(removed) == after:
                raise Stopped
            removed.append(path)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", counted)
        with pytest.raises(Stopped):
            quantized(folder)
    assert quantized(folder).path.read_bytes() == finished["quantize.rtn"]
    assert not (folder.parent / "out.tersor.work").exists()


def test_going_on_it_removes_what_a_kill_left_and_nothing_else(folder, monkeypatch):
    def stop(*args):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "write_states", stop)
        with pytest.raises(Stopped):
            quantized(folder, work=folder.parent)
    names = [".out.tersor.0a1b2c3d.part", ".block-00001.safetensors.0a1b2c3d.part"]
    other = folder.parent / ".other.tersor.0a1b2c3d.part"
    for path in (*(folder.parent / name for name in names), other):
        path.touch()
    quantized(folder, work=folder.parent)
    assert {path.name for path in folder.parent.iterdir()} == {"model", "out.tersor", other.name}


def test_a_network_that_is_passed_stays_as_it_was(folder, finished):
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    assert quantized(folder, model=model).path.read_bytes() == finished["quantize.rtn"]
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_methods_without_data_need_no_tokens(folder, finished):
    assert quantized(folder, calibration=None).path.read_bytes() == finished["quantize.rtn"]
    with pytest.raises(TaskError, match="needs inputs"):
        quantized(folder, method="quantize.gptq", calibration=None)


def shard_with(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def altered(folder, name, change):
    path = shard_with(folder, name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, {"format": "pt"})


def nan(tensor):
    tensor[1, 2] = torch.nan
    return tensor


def lie(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def config_with(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: shard_with(f, QUERY).unlink(), "it does not exist"),
        (lambda f: altered(f, QUERY, lambda t: t[:16]), r"q_proj.weight\" has shape \(16, 32\)"),
        (lambda f: altered(f, QUERY, nan), r"q_proj.weight\" .* NaN or infinity in 1 of its 1024"),
        (lambda f: altered(f, QUERY, lambda t: t.to(torch.int8)), "quantized already"),
        (lambda f: lie(f, lambda m: m.update({QUERY: "model.safetensors"})), "cannot be read|bel"),
        (lambda f: lie(f, lambda m: m.update({QUERY: "../model.safetensors"})), "in its folder"),
        (lambda f: lie(f, lambda m: m.update(none=next(iter(m.values())))), "do not belong"),
        (lambda f: config_with(f, num_hidden_layers=5), r'lacks "model.layers.3'),
        (lambda f: config_with(f, hidden_size=64), "check that config.json belongs"),
        (lambda f: config_with(f, model_type="unheard"), "no language model that transformers"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, said):
    damage(folder)
    with pytest.raises(ModelError, match=said):
        quantized(folder)
    assert not (folder.parent / "out.tersor").exists()


def test_code_in_the_folder_is_not_run(folder, tmp_path):
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config_with(
        folder,
        model_type="evil",
        auto_map={
            "AutoConfig": "modeling_evil.EvilConfig",
            "AutoModelForCausalLM": "modeling_evil.Evil",
        },
    )
    with pytest.raises(ModelError, match="no language model that transformers can build"):
        quantized(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"method": "prune.magnitude", "options": {}}, OptionError, "does not quantize"),
        ({"options": {"bit": 4}}, OptionError, "did you mean 'bits'"),
        ({"options": {"include": "lm_head"}}, OptionError, "leave no weight of the blocks"),
        ({"memory": 1e8}, OptionError, "largest block of 0.00 GB and 96 tokens need up to 1.0"),
        ({"calibration": tokens() + 50}, TaskError, "the network knows 0 to 99"),
        ({"calibration": tokens().float()}, TaskError, "are no token ids"),
        ({"calibration": tokens(4, 0)}, TaskError, "are no token ids"),
    ],
)
def test_what_cannot_be_done_is_refused(folder, given, error, said):
    with pytest.raises(error, match=said):
        quantized(folder, **given)


@pytest.mark.parametrize("method", ["quantize.static", "quantize.dynamic"])
def test_methods_that_add_what_no_checkpoint_holds_are_refused(folder, method):
    with pytest.raises(ModelError, match=rf'{method} adds "model.layers.0.*input_grid'):
        quantized(folder, method=method, options={})
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("out", "given", "error", "said"),
    [
        ("none/out.tersor", {}, OutputError, "in a folder that exists and is writable"),
        ("model", {}, OutputError, "give the path of a file"),
        ("out.tersor", {"ends": 12}, OptionError, "ends=12; choose 1 to 8 bits, or None"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_the_start(folder, out, given, error, said):
    with pytest.raises(error, match=said):
        quantize_folder(folder, folder.parent / out, method="quantize.rtn", **given)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_other_hidden_states_than_one_row_a_token_are_refused(tmp_path):
    # Gemma 3n gives its blocks several versions of them at once.
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma3nTextConfig(
        **SIZES,
        vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=8,
        layer_types=kinds,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 3,
    )
    saved(tmp_path / "model", network(config))
    with pytest.raises(ModelError, match=r"first block is given \(4, 4, 24, 32\) for token ids"):
        quantized(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_table_of_tokens_is_the_longest_where_the_network_does_not_say():
    model = nn.ModuleDict({"places": nn.Embedding(64, 8), "tokens": nn.Embedding(100, 8)})
    assert token_embedding(model) is model["tokens"]
    assert token_embedding(nn.Linear(2, 2)) is None
    tied = network(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    assert token_embedding(tied) is tied.model.embed_tokens


def test_blocks_must_be_called_alike():
    mask = torch.ones(2)
    first = Call(None, (mask, None), {"flag": True})
    check_alike(first, Call(None, (mask.clone(), None), {"flag": True}))
    for other in (
        Call(None, (mask, mask), {"flag": True}),
        Call(None, (mask,), {"flag": True}),
        Call(None, (mask + 1, None), {"flag": True}),
        Call("hidden", (mask, None), {"flag": True}),
        Call(None, (mask, None), {"flag": False}),
    ):
        with pytest.raises(ModelError, match="called differently for each batch"):
            check_alike(first, other)


def test_memory_is_stated_for_what_the_method_does():
    model = network()
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.model.layers]

    def stated(tokens, **given):
        given = {"solved": False, "symmetric": True, "bits": 4, "file_bytes": 10**9, **given}
        return needs.needs_of(model, list(model.model.layers), tokens, **given).memory

    assert stated(0) == 10**9 + 2 * 4 * max(sizes)
    # 8 copies of (48, 32), 3 squares of 48 inputs, and what 96 tokens give.
    solved = 4 * (8 * 48 * 32 + 3 * 48**2) + 4 * 96 * (48 + 3 * 32)
    assert stated(96, solved=True) == stated(0) + solved
    weights = sum(p.numel() for p in model.parameters())
    assert stated(0, symmetric=False) == max(stated(0), 10**9 + 2 * weights)


def test_disk_is_stated_for_the_width_of_hidden_states_where_heads_have_norms_too():
    model = network(transformers.Qwen3Config(**SIZES))
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (8,)
    options = {"solved": True, "symmetric": True, "bits": 4, "file_bytes": 10**9}
    found = needs.needs_of(model, list(model.model.layers), 96, **options)
    weights = sum(p.numel() for p in model.parameters())
    assert found.work == round(1.1 * weights) + 2 * 4 * 96 * 32


def test_a_full_disk_is_refused_before_anything_is_written(folder, monkeypatch):
    class Full:
        f_bavail, f_frsize = 1, 1024

    monkeypatch.setattr(needs.os, "statvfs", lambda path: Full)
    with pytest.raises(OutputError, match=r"of free disk and has 0.00 GB"):
        quantized(folder)


def test_nothing_is_left_where_the_run_cannot_be_noted(folder, monkeypatch):
    def full(*args):
        raise OutputError("no room")

    monkeypatch.setattr(job, "write_text", full)
    with pytest.raises(OutputError, match="no room"):
        quantized(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_work_folder_serves_one_run(folder, monkeypatch):
    def stop(*args):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "write_states", stop)
        with pytest.raises(Stopped):
            quantized(folder)
    with pytest.raises(OptionError, match="another run, with other calibration and options"):
        quantized(folder, options={"bits": 3}, calibration=tokens(2))
    config_with(folder, rms_norm_eps=1e-3)
    with pytest.raises(OptionError, match="another run, with other network;"):
        quantized(folder)
    config_with(folder, rms_norm_eps=1e-6)
    altered(folder, QUERY, lambda t: t * 2)
    with pytest.raises(OptionError, match="another run, with other files"):
        quantized(folder)
    (folder.parent / "out.tersor.work" / job._NOTE).unlink()
    quantized(folder)


def test_tokens_come_from_ids_or_a_text(tmp_path):
    import numpy as np

    np.save(tmp_path / "ids.npy", np.arange(50, dtype=np.uint16))
    assert torch.equal(
        read_tokens(tmp_path / "ids.npy", tmp_path, sequences=3, length=20),
        torch.arange(40).reshape(2, 20),
    )
    with pytest.raises(TaskError, match="has 50 tokens, fewer than one sequence of length=51"):
        read_tokens(tmp_path / "ids.npy", tmp_path, length=51)
    np.save(tmp_path / "floats.npy", np.zeros(50))
    with pytest.raises(TaskError, match="token ids are whole numbers"):
        read_tokens(tmp_path / "floats.npy", tmp_path)
    (tmp_path / "text.txt").write_text("some words")
    with pytest.raises(TaskError, match="holds no tokenizer"):
        read_tokens(tmp_path / "text.txt", tmp_path)
    with pytest.raises(TaskError, match="does not exist"):
        read_tokens(tmp_path / "none.txt", tmp_path)


def stories_folder(path):
    """stories260K as a Hugging Face Llama: there, halves of a head turn, here, neighbours do."""
    model = zoo.stories260k()
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )

    def halves(weight):
        return weight.unflatten(0, (-1, 4, 2)).transpose(1, 2).flatten(0, 2).contiguous()

    found = {"model.embed_tokens.weight": model.tok_embeddings.weight}
    found["model.norm.weight"] = model.norm.weight
    for at, layer in enumerate(model.layers):
        here = f"model.layers.{at}"
        found |= {
            f"{here}.input_layernorm.weight": layer.attention_norm.weight,
            f"{here}.post_attention_layernorm.weight": layer.ffn_norm.weight,
            f"{here}.self_attn.q_proj.weight": halves(layer.wq.weight),
            f"{here}.self_attn.k_proj.weight": halves(layer.wk.weight),
            f"{here}.self_attn.v_proj.weight": layer.wv.weight,
            f"{here}.self_attn.o_proj.weight": layer.wo.weight,
            f"{here}.mlp.gate_proj.weight": layer.w1.weight,
            f"{here}.mlp.down_proj.weight": layer.w2.weight,
            f"{here}.mlp.up_proj.weight": layer.w3.weight,
        }
    path.mkdir()
    save_file({n: t.detach() for n, t in found.items()}, path / "model.safetensors")
    config.save_pretrained(path)
    return path, model


@needs_data
def test_stories260k_keeps_its_perplexity(tmp_path):
    path, original = stories_folder(tmp_path / "model")
    stories = zoo.story_ids(60)
    ids = torch.stack([story[:96] for story in stories if len(story) >= 96])
    seen, unseen = ids[:16], ids[16:40]
    done = quantized(path, method="quantize.gptq", options={"bits": 4}, calibration=seen)
    network = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        assert torch.allclose(network(unseen).logits, original(unseen), atol=1e-3)
    options = {"bits": 4, "include": "model.layers.*"}
    rounded = copy.deepcopy(network)
    table = rounded.get_parameter("model.embed_tokens.weight")
    table.data = Affine.encode(table, bits=8).dense()
    batches = seen.split(8)
    found = forms_in(done.path, network)
    wanted = whole(rounded, batches, options=options)
    assert_same({n: f for n, f in found.items() if n in wanted}, wanted)
    small = copy.deepcopy(network)
    tersor.load(done.path, into=small)

    def loss(model):
        with torch.no_grad():
            logits = model(unseen).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), unseen[:, 1:].flatten())

    assert loss(small) < loss(network) + 0.15


@needs_data
def test_a_network_of_ones_own_needs_no_config(tmp_path):
    model = zoo.stories260k()
    save_file(
        {n: p.detach().clone() for n, p in model.named_parameters()}, tmp_path / "m.safetensors"
    )
    ids = torch.stack([story[:64] for story in zoo.story_ids(40) if len(story) >= 64][:8])
    done = quantize_folder(
        tmp_path / "m.safetensors",
        tmp_path / "out.tersor",
        options={"bits": 4, "include": "layers.*"},
        calibration=ids,
        model=zoo.Stories(),
    )
    wanted = whole(model, [ids], options={"bits": 4, "include": "layers.*"})
    assert_same(forms_in(done.path, model), wanted)
