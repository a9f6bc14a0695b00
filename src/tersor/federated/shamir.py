"""Secrets in shares: any `threshold` of them give the secret back, fewer say nothing about it.

Source: Shamir 1979, "How to share a secret", over the integers modulo the prime 2**521 - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tersor.errors import FileError, OptionError
from tersor.federated.options import check_count

PRIME = 2**521 - 1
SIZE = 66
"""Bytes of a share."""
MOST_SECRET = 64
"""Bytes of a secret, at most."""
_SPARE = 8
"""Bytes drawn beyond those of the prime, so that every remainder is as likely as any other."""


def split(
    secret: bytes, count: int, *, threshold: int, entropy: Callable[[int], bytes]
) -> list[bytes]:
    """Shares 1 to `count` of a secret of at most 64 bytes.

    entropy: gives so many random bytes: `secrets.token_bytes`, unless for a test
    """
    check_count("threshold", threshold, most=count)
    if len(secret) > MOST_SECRET:
        raise OptionError(
            f"a secret of {len(secret)} bytes cannot be shared: {MOST_SECRET} are the most; share "
            "a hash or a key in its place"
        )
    polynomial = [int.from_bytes(secret, "little")]
    polynomial += [
        int.from_bytes(entropy(SIZE + _SPARE), "little") % PRIME for _ in range(threshold - 1)
    ]
    return [_at(polynomial, x).to_bytes(SIZE, "little") for x in range(1, count + 1)]


def join(shares: Mapping[int, bytes], size: int) -> bytes:
    """The secret of `size` bytes from `threshold` or more of its shares, by their numbers from 1.

    Raises FileError where they cannot be shares of such a secret. Shares that were altered mostly
    show that way, and not always: who may not trust them keeps a hash of the secret.
    """
    points = {x: int.from_bytes(share, "little") for x, share in shares.items()}
    if not points or any(y >= PRIME for y in points.values()):
        raise FileError("a share is no number of the field; leave out who sent it")
    secret = 0
    for x, y in points.items():
        above = below = 1
        for other in points:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        secret = (secret + y * above * pow(below, -1, PRIME)) % PRIME
    if secret >> (8 * size):
        raise FileError(
            f"the {len(points)} shares do not belong together, or are fewer than their threshold; "
            "ask others for theirs"
        )
    return secret.to_bytes(size, "little")


def _at(polynomial: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value
