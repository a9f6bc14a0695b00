"""What stands around a run: settings of torch are as before behind it."""

import pytest
import torch
from torch import nn

from tersor.measure.running import differentiable_recurrence, whole_floats


def settings() -> list[bool]:
    cudnn = torch.backends.cudnn
    return [cudnn.enabled, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]


def test_products_are_in_whole_floats_inside_alone():
    before = settings()
    with whole_floats():
        assert settings() == [before[0], False, False]
    assert settings() == before


@pytest.mark.parametrize(("net", "on"), [(nn.GRU(2, 3), False), (nn.Linear(2, 3), True)])
def test_recurrent_layers_alone_do_without_what_gives_no_gradients(net, on):
    before = settings()
    with differentiable_recurrence(net):
        assert torch.backends.cudnn.enabled is on
    assert settings() == before
