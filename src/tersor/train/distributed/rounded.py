"""Every value of a gradient, in few bits: its sign, or 8 bits.

`Sign` sends 32 times fewer bytes, and needs its error feedback. `Int8` sends 4 times fewer and is
as good as free; more than that needs `PowerSGD` or `TopK`. Both are gathered, since sums of codes
with scales of their own mean nothing.

Source: Karimireddy, Rebjock, Stich, Jaggi 2019, arXiv:1901.09847, algorithm 1, for signs;
Dettmers 2016, arXiv:1511.04561, for 8 bits.
Differs from the papers: many workers average; 8 bits are steps of one size, from -127 to 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.forms.bitmask import pack_bits, unpack_bits
from tersor.train.distributed.compressor import Compressor, mean_of
from tersor.train.distributed.exchange import Talk, gathered


class _Coded(Compressor):
    """Codes and one float32 scale for each tensor."""

    def _exchange(self, wanted: list[Tensor]) -> Talk[tuple[list[Tensor], list[Tensor]]]:
        scales = torch.stack([self._scale(tensor) for tensor in wanted])
        codes = [self._coded(tensor, scale) for tensor, scale in zip(wanted, scales, strict=True)]
        message = [scales, *codes]

        def read(everyone: list[list[Tensor]]) -> list[Tensor]:
            return mean_of([self._read(own, wanted) for own in everyone])

        averaged = yield from gathered(message, read)
        return self._read(message, wanted), averaged

    def _read(self, message: list[Tensor], wanted: list[Tensor]) -> list[Tensor]:
        scales, *codes = message
        return [
            self._decoded(code, tensor.numel()).view_as(tensor) * scale
            for code, scale, tensor in zip(codes, scales, wanted, strict=True)
        ]

    def _scale(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def _coded(self, tensor: Tensor, scale: Tensor) -> Tensor:
        raise NotImplementedError

    def _decoded(self, codes: Tensor, size: int) -> Tensor:
        """(size,) float32, still to be scaled."""
        raise NotImplementedError


class Sign(_Coded):
    """Each value as its sign, times the mean magnitude of its tensor.

    A step sends a bit for each value (zero counts as positive) and 4 bytes for each tensor.

    feedback: see `Compressor`; without it, training stalls
    """

    def _scale(self, tensor: Tensor) -> Tensor:
        return tensor.abs().mean()

    def _coded(self, tensor: Tensor, scale: Tensor) -> Tensor:
        return pack_bits(tensor.reshape(-1) >= 0)

    def _decoded(self, codes: Tensor, size: int) -> Tensor:
        return 2 * unpack_bits(codes, size).float() - 1


class Int8(_Coded):
    """Each value as the nearest of 255 even steps between minus and plus its tensor's largest.

    A step sends a byte for each value and 4 bytes for each tensor. Error: at most half a step.

    feedback: see `Compressor`
    """

    def _scale(self, tensor: Tensor) -> Tensor:
        return tensor.abs().amax() / 127

    def _coded(self, tensor: Tensor, scale: Tensor) -> Tensor:
        steps = tensor.reshape(-1) / scale.clamp(min=torch.finfo(torch.float32).tiny)
        return steps.round().clamp(-127, 127).to(torch.int8)

    def _decoded(self, codes: Tensor, size: int) -> Tensor:
        return codes.float()
