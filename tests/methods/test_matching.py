"""Matching: blocks are found and mapped as anyone would by hand."""

import pytest
import torch
from torch import nn

import zoo
from methods.toys import tokens
from tersor.errors import ModelError, OptionError
from tersor.methods.inside import channels_first, same_places, watching, weights
from tersor.methods.matching import blocks, matched, uniform
from tersor.surgery.skip import skip


def test_uniform_mapping_is_that_of_the_paper():
    # TinyBERT: 4 student layers of 12 take layers 3, 6, 9, 12.
    assert uniform("abcd", [str(n) for n in range(1, 13)]) == ["3", "6", "9", "12"]
    assert uniform("abc", "abc") == ["a", "b", "c"]
    assert uniform("ab", "abcde")[-1] == "e"
    assert uniform("abcd", "ab") == ["a", "a", "b", "b"]


def test_stages_are_mapped_one_by_one():
    found = matched("m", zoo.CifarResNet(8), zoo.CifarResNet(20), None)
    assert found == [(f"layer{n}.0", f"layer{n}.2") for n in (1, 2, 3)]


def test_lists_of_another_number_are_mapped_as_one():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(zoo.CifarBlock(4, 4, 1) for _ in range(3))

    found = matched("m", Flat(), zoo.CifarResNet(20), None)
    assert [b for _, b in found] == ["layer1.2", "layer2.2", "layer3.2"]


def test_blocks_that_were_skipped_leave_the_others_to_their_namesakes():
    small = skip(zoo.Stories(layers=4), {"layers.1": 0, "layers.2": 0})
    found = matched("m", small, zoo.Stories(layers=4), None)
    assert found == [("layers.0", "layers.0"), ("layers.3", "layers.3")]
    # What a skipped block of the teacher hands on is a state like any other.
    assert matched("m", zoo.Stories(layers=2), small, None)[0] == ("layers.0", "layers.1")


def test_only_the_outermost_blocks_of_the_largest_class_count():
    class Block(nn.Sequential):
        pass

    def wide() -> nn.Module:
        return Block(nn.Linear(4, 9), nn.Sequential(Block(nn.Linear(9, 9)), Block(nn.Linear(9, 4))))

    stem = [nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]
    assert blocks(nn.Sequential(*stem, wide(), nn.ReLU(), wide())) == [["2", "4"]]
    assert blocks(nn.Sequential(*stem)) == [["0", "1"]]
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
    assert blocks(zoo.Stories(layers=1)) == [["layers.0"]]


def test_given_pairs_are_taken_and_wrong_ones_refused():
    small, large = zoo.Stories(layers=2), zoo.Stories(layers=4)
    assert matched("m", small, large, {"norm": "layers.3"}) == [("norm", "layers.3")]
    with pytest.raises(OptionError, match=r"the student has no layer 'layer.1'; .* 'layers.1'"):
        matched("m", small, large, {"layer.1": "layers.1"})
    with pytest.raises(OptionError, match=r"the teacher has no layer 'layers.9'"):
        matched("m", small, large, {"layers.1": "layers.9"})
    with pytest.raises(OptionError, match="names no layer"):
        matched("m", small, large, {})
    with pytest.raises(ModelError, match=r"m finds no repeated blocks in the student, Linear"):
        matched("m", nn.Linear(2, 2), large, None)


def test_what_layers_gave_is_taken_down_once_for_each_call():
    net = zoo.Stories(layers=2).eval()
    with watching(net, ["layers.1"], learning=True) as seen:
        net(tokens(2, 5))
        net(tokens(3, 5))
        with torch.no_grad():
            net(tokens(4, 5))
    taken = seen.taken()
    assert [t.shape for t in taken.outputs["layers.1"]] == [(2, 5, 64), (3, 5, 64)]
    assert [t.shape for t in taken.inputs["layers.1"]] == [(2, 5, 64), (3, 5, 64)]
    assert taken.masks == [None, None]
    assert not seen.outputs
    assert not net._forward_pre_hooks
    assert not net.layers[1]._forward_hooks


def test_channels_come_second_and_places_are_averaged():
    assert channels_first(torch.zeros(2, 7, 3), nn.Linear(3, 3)).shape == (2, 3, 7)
    assert channels_first(torch.zeros(2, 3, 7), nn.Conv1d(3, 3, 1)).shape == (2, 3, 7)
    large = torch.arange(16.0).reshape(1, 1, 4, 4)
    one, other = same_places(torch.zeros(1, 5, 2, 4), large)
    assert one.shape[2:] == other.shape[2:] == (2, 4)
    assert other[0, 0, 0].tolist() == [2, 3, 4, 5]
    with pytest.raises(ModelError, match=r"gives \(1, 5, 2, 4\) and the teacher's \(1, 3\)"):
        same_places(torch.zeros(1, 5, 2, 4), torch.zeros(1, 3))


def test_masks_count_only_where_they_fit():
    mask = torch.tensor([[1, 1, 0]])
    assert weights(mask, torch.Size([1, 8, 3])).tolist() == [[1, 1, 0]]
    assert weights(mask, torch.Size([1, 8, 4])) is None
    assert weights(None, torch.Size([1, 8, 3])) is None
