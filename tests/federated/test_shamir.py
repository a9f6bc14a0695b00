"""Any threshold of shares gives the secret back, and fewer say nothing."""

import itertools

import pytest

from federated.worlds import entropy
from tersor.errors import FileError, OptionError
from tersor.federated import shamir


@pytest.mark.parametrize(("count", "threshold"), [(1, 1), (2, 2), (5, 3), (7, 7), (20, 14)])
@pytest.mark.parametrize("size", [1, 32, 64])
def test_every_threshold_of_shares_gives_the_secret(count, threshold, size):
    secret = entropy(size)(size)
    shares = shamir.split(secret, count, threshold=threshold, entropy=entropy(1))
    assert {len(share) for share in shares} == {shamir.SIZE}
    numbered = dict(enumerate(shares, 1))
    for chosen in itertools.islice(itertools.combinations(numbered, threshold), 40):
        assert shamir.join({x: numbered[x] for x in chosen}, size) == secret
    assert shamir.join(numbered, size) == secret


def test_a_case_worked_by_hand():
    # 5 + 7 x at 1, 2 and 3 is 12, 19 and 26; lines through two of them meet 0 at 5.
    shares = shamir.split(
        b"\x05", 3, threshold=2, entropy=lambda n: b"\x07" + bytes(n - 1)
    )  # fmt: skip
    assert [int.from_bytes(share, "little") for share in shares] == [12, 19, 26]
    assert shamir.join({1: shares[0], 3: shares[2]}, 1) == b"\x05"


def test_fewer_shares_fit_every_secret():
    # With one share less, for every secret there is a last share that leads to it.
    shares = shamir.split(b"\x2a", 3, threshold=2, entropy=entropy(2))
    y = int.from_bytes(shares[0], "little")
    for secret in range(256):
        other = (2 * y - secret) % shamir.PRIME
        forged = {1: shares[0], 2: other.to_bytes(shamir.SIZE, "little")}
        assert shamir.join(forged, 1) == bytes([secret])


def test_too_few_or_foreign_shares_are_noticed():
    shares = dict(enumerate(shamir.split(entropy()(32), 5, threshold=3, entropy=entropy(1)), 1))
    with pytest.raises(FileError, match="2 shares do not belong together"):
        shamir.join({1: shares[1], 2: shares[2]}, 32)
    with pytest.raises(FileError, match="no number of the field"):
        shamir.join({1: b"\xff" * shamir.SIZE, 2: shares[2], 3: shares[3]}, 32)
    with pytest.raises(FileError, match="no number of the field"):
        shamir.join({}, 32)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: shamir.split(b"a", 3, threshold=4, entropy=entropy()), "threshold=4 must be"),
        (lambda: shamir.split(b"a", 3, threshold=0, entropy=entropy()), "threshold=0 must be"),
        (lambda: shamir.split(bytes(65), 3, threshold=2, entropy=entropy()), "64 are the most"),
    ],
)
def test_wrong_use_is_refused(call, said):
    with pytest.raises(OptionError, match=said):
        call()


def test_the_prime_is_one():
    # Lucas and Lehmer's test of 2**521 - 1.
    value = 4
    for _ in range(521 - 2):
        value = (value * value - 2) % shamir.PRIME
    assert value == 0
