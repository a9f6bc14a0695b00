"""What methods do about weights that were pruned: zeros stay zero, and stay cheap to store."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tersor.errors import OptionError
from tersor.forms import Affine, Bitmask, BlockFloat, Codebook, NofM
from tersor.forms.form import Form
from tersor.surgery.hold import bake, hold, release
from tersor.surgery.walk import Site, walk
from tersor.train.regime import Regime


def sparse_form(form: Form | None) -> Bitmask | NofM | None:
    """The form that says which weights are zero, or None where the weight was not pruned."""
    if form is None:
        return None
    return next((inner for inner in form.forms() if isinstance(inner, Bitmask | NofM)), None)


class Zeros(Regime):
    """Takes the gradients of zeros away again: compressed ones of many processes fill all places.

    latents: weights of which what is zero now stays zero
    """

    def __init__(self, latents: Sequence[nn.Parameter]) -> None:
        self._kept = [(latent, latent.detach() != 0) for latent in latents]

    def gradients(self, step: int) -> None:
        """Behind whatever averages them."""
        for latent, kept in self._kept:
            if latent.grad is not None:
                latent.grad.mul_(kept.to(latent.grad.device))


def check_uncoded(sites: Sequence[Site]) -> None:
    """Raises OptionError for a weight that is quantized already, in any place."""
    for site in sites:
        if site.form is not None and sparse_form(site.form) is not site.form:
            raise OptionError(
                f'"{site.name}" of shape {tuple(site.weight.shape)} is held as {site.form.kind} '
                "already, which quantizing again would only worsen; start from the original, or "
                "exclude it"
            )


def released(site: Site) -> Bitmask | NofM | None:
    """Makes a weight that is not quantized plain; returns what held it if it was pruned."""
    for layer, attribute in site.uses:
        bake(layer, attribute)
    held = sparse_form(site.form)
    if held is None:
        return None
    plain: nn.Parameter | None = None
    for layer, attribute in site.uses:
        plain = release(layer, attribute, plain)
    return held


def release_codes(model: nn.Module) -> nn.Module:
    """Decodes every weight that is quantized, in place; what is only pruned stays so."""
    for site in walk(model):
        if site.form is None or sparse_form(site.form) is site.form:
            continue
        plain: nn.Parameter | None = None
        for layer, attribute in site.uses:
            plain = release(layer, attribute, plain)
    return model


def keep_zeros(coded: Affine | BlockFloat | Codebook, sparse: Bitmask | NofM) -> None:
    """Stores the codes of `coded` sparsely, as the weight was; code 0 must stand for zero."""
    codes = coded.codes
    if isinstance(sparse, NofM) and codes.shape[0] == sparse.shape[sparse.axis]:
        # A codebook's codes are laid out as the weight, others as (outputs, inputs).
        axis = sparse.axis if isinstance(coded, Codebook) else 0
        hold(coded, "codes", NofM.encode(codes, n=sparse.n, m=sparse.m, axis=axis, bits=coded.bits))
    else:
        hold(coded, "codes", Bitmask.encode(codes, bits=coded.bits))
