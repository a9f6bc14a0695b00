"""Soft masks: what is hidden gives nothing and gets nothing, and scores learn through the mask."""

import pytest
import torch
from torch import nn

from tersor.codec import save
from tersor.errors import ModelError
from tersor.forms import Bitmask, SoftMask
from tersor.surgery import hold


def masked(shape: tuple[int, ...], *, scored: bool, seed: int = 0) -> SoftMask:
    """In the middle of training: latents of any value, a third of them hidden."""
    generator = torch.Generator().manual_seed(seed)
    form = SoftMask.encode(torch.randn(shape, generator=generator), scored=scored)
    form.mask.copy_(torch.rand(shape, generator=generator) > 1 / 3)
    return form


def test_gradients_worked_by_hand():
    # Weights 2, -3 with the second hidden; dL/dweight is 5 and 7. Latents get 5 and 0; the scores
    # get dL/dweight * latent, 10 and -21, hidden or not.
    form = SoftMask.encode(torch.tensor([[2.0, -3.0]]), scored=True)
    form.mask[0, 1] = False
    weight = form.dense()
    assert weight.tolist() == [[2.0, 0.0]]
    (weight * torch.tensor([[5.0, 7.0]])).sum().backward()
    assert form.latent.grad.tolist() == [[5.0, 0.0]]
    assert form.scores.grad.tolist() == [[10.0, -21.0]]


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("shape", [(4, 5), (3, 2, 3, 3), (1, 1)])
def test_gradients_are_those_of_a_layer_written_out(shape, scored):
    # Sanh et al. 2020, eq. 2: a_i = sum_k W_ik M_ik x_k, so dL/dS_ij = dL/da_i W_ij x_j.
    form = masked(shape, scored=scored)
    flat = form.latent.detach().flatten(1)
    x = torch.randn(flat.shape[1], generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(flat.shape[0], generator=torch.Generator().manual_seed(2))
    (form.dense().flatten(1) @ x @ upstream).backward()
    for i in range(flat.shape[0]):
        for j in range(flat.shape[1]):
            above = float(upstream[i] * x[j])
            shown = float(form.mask.flatten(1)[i, j])
            assert float(form.latent.grad.flatten(1)[i, j]) == pytest.approx(above * shown)
            if scored:
                wanted = above * float(flat[i, j])
                assert float(form.scores.grad.flatten(1)[i, j]) == pytest.approx(wanted)


@pytest.mark.parametrize("scored", [True, False])
def test_freezing_changes_nothing(scored):
    form = masked((6, 7), scored=scored)
    frozen = form.freeze()
    assert isinstance(frozen, Bitmask)
    assert torch.equal(frozen.dense(), form.dense())
    assert torch.equal(frozen.kept(), form.mask)


def test_zeros_are_hidden_from_the_start():
    form = SoftMask.encode(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    assert form.mask.tolist() == [[False, True], [True, False]]
    assert form.stored_bits() == 4 * 32 + 4


def test_it_is_not_written_into_a_file(tmp_path):
    layer = nn.Linear(4, 4)
    hold(layer, "weight", SoftMask.encode(layer.weight))
    with pytest.raises(ModelError, match=r"held by a SoftMask .* training only; freeze"):
        save(nn.Sequential(layer), tmp_path / "m.tersor", graph=False)
