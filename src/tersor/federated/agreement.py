"""How two ends come to a secret that the server between them does not know."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Protocol

from tersor.errors import FileError, MissingExtra

Entropy = Callable[[int], bytes]
_TAG, _TAG_KEY = 16, 32


class Agreement(Protocol):
    """A Diffie-Hellman: `agree(a, public(b)) == agree(b, public(a))`.

    secret_size, public_size: bytes; a secret has at most 64
    """

    secret_size: int
    public_size: int

    def secret(self, entropy: Entropy) -> bytes:
        """A new secret key."""
        ...

    def public(self, secret: bytes) -> bytes:
        """The key that others may know."""
        ...

    def agree(self, secret: bytes, public: bytes) -> bytes:
        """What both ends know then. Raises FileError for a public key that is none."""
        ...


class X25519:
    """Curve25519 (RFC 7748), by the package `cryptography`. Raises MissingExtra without it."""

    secret_size = 32
    public_size = 32

    def __init__(self) -> None:
        try:
            from cryptography.hazmat.primitives.asymmetric import x25519
        except ImportError as error:
            raise MissingExtra("federated", "cryptography") from error
        self._curve = x25519

    def secret(self, entropy: Entropy) -> bytes:
        return entropy(self.secret_size)

    def public(self, secret: bytes) -> bytes:
        found: bytes = self._key(secret).public_key().public_bytes_raw()
        return found

    def agree(self, secret: bytes, public: bytes) -> bytes:
        try:
            theirs = self._curve.X25519PublicKey.from_public_bytes(public)
            found: bytes = self._key(secret).exchange(theirs)
        except ValueError as error:
            raise FileError(f"a public key is none ({error}); leave out who sent it") from None
        return found

    def _key(self, secret: bytes):  # type: ignore[no-untyped-def]
        return self._curve.X25519PrivateKey.from_private_bytes(secret)


def seal(content: bytes, key: bytes, sender: int, receiver: int) -> bytes:
    """Hides content from all who lack the key, with a tag that shows changes.

    key: that both ends agreed on; each end may seal one message with it, for its stream is used up
    """
    pad, tag_key = _stream(key, sender, receiver, len(content))
    hidden = bytes(a ^ b for a, b in zip(content, pad, strict=True))
    return hidden + hashlib.blake2b(hidden, key=tag_key, digest_size=_TAG).digest()


def unseal(message: bytes, key: bytes, sender: int, receiver: int) -> bytes:
    """The inverse. Raises FileError for a message that was altered, or sealed for others."""
    hidden, tag = message[:-_TAG], message[-_TAG:]
    pad, tag_key = _stream(key, sender, receiver, len(hidden))
    wanted = hashlib.blake2b(hidden, key=tag_key, digest_size=_TAG).digest()
    if not hmac.compare_digest(tag, wanted):
        raise FileError(f"the shares of client {sender} were altered on their way; leave it out")
    return bytes(a ^ b for a, b in zip(hidden, pad, strict=True))


def _stream(key: bytes, sender: int, receiver: int, size: int) -> tuple[bytes, bytes]:
    """A pad of the content's size, and the key of its tag."""
    ends = sender.to_bytes(4, "little") + receiver.to_bytes(4, "little")
    stream = hashlib.shake_256(b"tersor share" + key + ends).digest(_TAG_KEY + size)
    return stream[_TAG_KEY:], stream[:_TAG_KEY]
