"""What a worker has sent."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Traffic:
    """Bytes that one worker handed over so far; what a network adds or forwards is not counted.

    sent: values, places, signs and scales as they go on the wire
    plain: what as many steps would have sent as float32 gradients
    """

    sent: int = 0
    plain: int = 0

    @property
    def saved(self) -> float:
        """How many times fewer bytes; 1 before the first step."""
        return self.plain / self.sent if self.sent else 1.0


def plain_bytes(tensors: Iterable[Tensor]) -> int:
    """Of gradients of these tensors, as float32."""
    return sum(4 * tensor.numel() for tensor in tensors)
