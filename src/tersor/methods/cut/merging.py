"""Merging: what removed units gave is made up for by those that stay, by least squares.

W' = (W C)_K (M_KK)^-1, where M are the moments of what a weight reads now, C those of what the
original reads with it, and K the inputs that stay: of all weights that read only these, it gives
outputs nearest to the original's.

Source: He, Zhang, Sun 2017, arXiv:1707.06168, eq. 4 (the reconstruction); here layer after layer,
each for what the layers cut before it give, with C as in Qronos (arXiv:2505.11695, eq. 3).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tersor.forms import Dense
from tersor.forms.form import rows, unrows
from tersor.methods.layerwise import Layer, layerwise
from tersor.methods.moments import DAMPING
from tersor.surgery.hold import release
from tersor.surgery.walk import Site, walk
from tersor.task import Task


def merge(model: nn.Module, task: Task, columns: Mapping[str, Tensor], *, samples: int) -> set[str]:
    """Fits weights anew to the inputs that stay, in place; the others get columns of zeros.

    columns: by weight, (inputs,) bool, which of its inputs stay
    samples: calibration inputs to use, at most

    Returns the weights of which no product was seen, that only lost their columns.
    """
    twin = copy.deepcopy(model)
    here = [site for site in walk(model) if site.name in columns]
    parameters = {site.name: getattr(*site.uses[0]) for site in here}
    there = {site.name: site for site in walk(twin)}
    for site in here:
        site.weight.copy_(_masked(site, columns[site.name]))
    unseen: set[str] = set()

    def fit(layer: Layer) -> Dense:
        name, shape = layer.site.name, tuple(layer.site.weight.shape)
        if layer.moments is None:
            unseen.add(name)
            return Dense(layer.site.weight, layer.site.weight.dtype)
        original = rows(there[name].weight, layer.site.axis)
        # A weight that is used several times meets what the network gave it before it was cut.
        own, cross = layer.moments.own, layer.moments.cross
        found = fitted(original, own, own if cross is None else cross, columns[name])
        return Dense(unrows(found, shape, layer.site.axis), layer.site.weight.dtype)

    layerwise(model, task, here, fit, samples=samples, original=twin)
    for site in here:
        # Its values were set in place; a parameter that is trained stays one.
        for layer, attribute in site.uses:
            release(layer, attribute, parameters[site.name])
    return unseen


def fitted(matrix: Tensor, own: Tensor, cross: Tensor, kept: Tensor) -> Tensor:
    """(outputs, inputs), zero where inputs do not stay.

    matrix: (outputs, inputs) of the original
    own, cross: (groups, inputs, inputs), see `Moments`; rows of the matrix belong to groups in turn
    kept: (inputs,) bool
    """
    found = torch.zeros_like(matrix)
    for part, few, x, yx in zip(
        found.chunk(len(own)), matrix.chunk(len(own)), own, cross, strict=True
    ):
        system = x[kept][:, kept].double()
        extra = DAMPING * float(system.diagonal().mean()) or 1.0
        system.diagonal().add_(extra)
        wanted = (few.double() @ yx[:, kept].double()).add_(few[:, kept], alpha=extra)
        part[:, kept] = torch.linalg.solve(system, wanted.T).T.to(matrix.dtype)
    return found


def _masked(site: Site, kept: Tensor) -> Tensor:
    matrix = rows(site.weight, site.axis) * kept.to(site.weight.device)
    return unrows(matrix, tuple(site.weight.shape), site.axis)
