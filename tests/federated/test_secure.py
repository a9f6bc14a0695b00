"""The sum is exact whoever falls silent, and no single vector can be seen."""

import hashlib

import numpy as np
import pytest

from federated.worlds import Toy, entropy
from tersor.errors import FileError, MissingExtra, OptionError
from tersor.federated import shamir
from tersor.federated.agreement import X25519
from tersor.federated.grid import read_table
from tersor.federated.secure import Participant, least_threshold, mask, signed
from tersor.federated.unmasking import SecureSum

SIZE = 50


def vectors(count, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 2**32, (count, SIZE), np.uint32)


def opened(given, *, silent=(), mute=(), unshared=(), agreement=None, threshold=None, lie=None):
    """One round.

    silent: whose vector never arrives; unshared: who falls silent before its shares are sent
    mute: whose vector arrives, but who reveals nothing
    """
    agreement = agreement or Toy()
    threshold = threshold or least_threshold(len(given))
    people = [Participant(i, agreement=agreement, entropy=entropy(i)) for i in range(len(given))]
    keys = {p.number: p.keys() for p in people}
    boxes = {
        p.number: p.shares(keys, threshold=threshold) for p in people if p.number not in unshared
    }
    hub = SecureSum(keys, boxes, size=SIZE, agreement=agreement)
    for number in boxes:
        inbox = {n: box[number] for n, box in boxes.items() if n != number}
        assert people[number].unsealed(inbox) == []
        masked = people[number].masked(given[number])
        if number not in silent:
            hub.add(number, masked)
    revealed = {n: people[n].reveal(hub.arrived) for n in hub.arrived if n not in mute}
    if lie is not None:
        revealed = lie(revealed)
    return hub.total(revealed, threshold=threshold)


def summed(given, numbers):
    return given[sorted(numbers)].sum(0, dtype=np.uint64).astype(np.uint32)


@pytest.mark.parametrize("count", [3, 5, 10])
def test_the_sum_is_exact_when_all_are_heard(count):
    given = vectors(count)
    assert np.array_equal(opened(given), summed(given, range(count)))


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_is_exact_with_thirty_percent_of_drop_outs(seed):
    given = vectors(10, seed)
    silent = set(np.random.default_rng(seed).permutation(10)[:3].tolist())
    assert np.array_equal(opened(given, silent=silent), summed(given, set(range(10)) - silent))


def test_the_sum_is_exact_with_drop_outs_in_every_step():
    given = vectors(10)
    found = opened(given, unshared={1}, silent={4, 7}, mute={0}, threshold=6)
    assert np.array_equal(found, summed(given, {0, 2, 3, 5, 6, 8, 9}))


def test_masks_cancel_as_the_paper_says():
    # Of three clients with seeds for each pair, what is left of the sum are the vectors.
    pairs = {(a, b): bytes([a, b]) for a in range(3) for b in range(3) if a < b}
    given = vectors(3)
    total = np.zeros(SIZE, np.uint32)
    for me in range(3):
        total += given[me]
        for pair, seed in pairs.items():
            if me in pair:
                other = sum(pair) - me
                total += signed(mask(seed, SIZE), me, other)
    assert np.array_equal(total, summed(given, range(3)))


def test_a_masked_vector_looks_like_noise_and_differs_every_time():
    def masked(seed):
        people = [
            Participant(i, agreement=Toy(), entropy=entropy(100 * seed + i)) for i in range(3)
        ]
        keys = {p.number: p.keys() for p in people}
        boxes = {p.number: p.shares(keys, threshold=2) for p in people}
        inbox = {n: boxes[n][0] for n in (1, 2)}
        people[0].unsealed(inbox)
        return people[0].masked(np.zeros(20_000, np.uint32))

    first, second = masked(1), masked(2)
    assert not (first == second).any()
    ones = np.unpackbits(first.view(np.uint8)).mean()
    # 640,000 fair bits: one standard deviation is 0.000625.
    assert abs(ones - 0.5) < 0.0035


def test_masks_are_of_shake_256():
    stream = hashlib.shake_256(b"tersor mask" + b"seed").digest(8)
    assert mask(b"seed", 2).tolist() == [
        int.from_bytes(stream[:4], "little"),
        int.from_bytes(stream[4:], "little"),
    ]


def test_too_few_cannot_open_the_sum():
    given = vectors(6)
    with pytest.raises(FileError, match="3 clients are left where threshold=4 are needed"):
        opened(given, silent={0, 1, 2})
    with pytest.raises(FileError, match="3 clients are left where threshold=4"):
        opened(given, mute={0, 1, 2})


def test_a_client_reveals_once_and_not_to_a_few():
    people = [Participant(i, agreement=Toy(), entropy=entropy(i)) for i in range(4)]
    keys = {p.number: p.keys() for p in people}
    boxes = {p.number: p.shares(keys, threshold=3) for p in people}
    inbox = {n: box[0] for n, box in boxes.items() if n != 0}
    people[0].unsealed(inbox)
    people[0].masked(vectors(1)[0])
    with pytest.raises(FileError, match="2 clients are left where threshold=3"):
        people[0].reveal([0, 1])
    with pytest.raises(FileError, match="has opened its shares of the round"):
        people[0].unsealed(inbox)
    with pytest.raises(FileError, match="has sent its vector of the round"):
        people[0].masked(vectors(1)[0])
    content = people[0].reveal([0, 1, 2])
    # Of each client one secret alone: the seed of three, the key of the one not heard.
    kinds = [content[at + 4] for at in range(0, len(content), 5 + shamir.SIZE)]
    assert kinds == [1, 1, 1, 0]
    with pytest.raises(FileError, match="has revealed its shares"):
        people[0].reveal([0, 1, 2, 3])


def test_lies_about_shares_are_noticed():
    def lie(revealed):
        altered = bytearray(revealed[0])
        altered[10] ^= 1
        return revealed | {0: bytes(altered)}

    given = vectors(5)
    with pytest.raises(FileError, match=r"committed itself to|do not belong together"):
        opened(given, lie=lie)


@pytest.mark.parametrize("bad", [b"\xff" * 71, b"\xff", bytes(10_000)])
def test_answers_that_cannot_be_read_are_left_out_while_enough_remain(bad):
    given = vectors(6)
    found = opened(given, silent={5}, lie=lambda revealed: revealed | {0: bad})
    assert np.array_equal(found, summed(given, range(5)))
    said = r"3 clients are left where threshold=4 .* of clients \[1, 2, 3\] are left out; begin"
    with pytest.raises(FileError, match=said):
        opened(given, lie=lambda revealed: revealed | dict.fromkeys((1, 2, 3), bad))


def test_who_is_left_out_has_no_mask_in_the_sum():
    people = [Participant(i, agreement=Toy(), entropy=entropy(i)) for i in range(4)]
    keys = {p.number: p.keys() for p in people}
    boxes = {p.number: p.shares(keys, threshold=3) for p in people}
    boxes[3][0] = bytes(len(boxes[3][0]))
    failed = [
        p.unsealed({n: b[p.number] for n, b in boxes.items() if n != p.number}) for p in people
    ]
    assert failed == [[3], [], [], []]
    given = vectors(4)
    hub = SecureSum(keys, range(3), size=SIZE, agreement=Toy())
    for number in range(3):
        hub.add(number, people[number].masked(given[number], without=[3]))
    revealed = {n: people[n].reveal(hub.arrived) for n in hub.arrived}
    assert np.array_equal(hub.total(revealed, threshold=3), summed(given, range(3)))
    with pytest.raises(FileError, match="2 clients are left where threshold=3"):
        people[3].masked(given[3], without=[0, 1])


def test_altered_shares_and_strange_keys_are_refused():
    people = [Participant(i, agreement=Toy(), entropy=entropy(i)) for i in range(3)]
    keys = {p.number: p.keys() for p in people}
    boxes = {p.number: p.shares(keys, threshold=2) for p in people}
    inbox = {n: boxes[n][0] for n in (1, 2)}
    inbox[2] = inbox[2][:5] + bytes([inbox[2][5] ^ 1]) + inbox[2][6:]
    assert people[0].unsealed(inbox) == [2]
    with pytest.raises(FileError, match="client 9 sent no keys"):
        people[1].unsealed({9: inbox[1]})
    with pytest.raises(FileError, match="has shared its secrets of the round"):
        people[0].shares(keys, threshold=2)
    fresh = Participant(0, agreement=Toy(), entropy=entropy())
    with pytest.raises(FileError, match=r"keys have 3 bytes where 48 are needed"):
        fresh.shares(keys | {1: b"key"}, threshold=2)
    with pytest.raises(FileError, match="1 clients are left where threshold=2"):
        fresh.shares({0: keys[0]}, threshold=2)


def test_tables_and_answers_that_are_too_long_are_refused():
    with pytest.raises(FileError, match="table of clients has 2048 bytes where 1024 are the most"):
        read_table(bytes(2048), 1)
    people = [Participant(i, agreement=Toy(), entropy=entropy(i)) for i in range(2)]
    hub = SecureSum({p.number: p.keys() for p in people}, [0, 1], size=1, agreement=Toy())
    with pytest.raises(FileError, match=r"1 clients are left .* shares of clients \[0\] are left"):
        hub.total({0: bytes(1000), 1: b""}, threshold=2)


def test_a_hub_takes_one_vector_of_the_right_size_from_each():
    people = [Participant(i, agreement=Toy(), entropy=entropy(i)) for i in range(3)]
    keys = {p.number: p.keys() for p in people}
    hub = SecureSum(keys, [0, 1], size=SIZE, agreement=Toy())
    with pytest.raises(FileError, match="client 2 has no vector to send"):
        hub.add(2, vectors(1)[0])
    with pytest.raises(FileError, match="has 3 numbers where 50 are summed"):
        hub.add(0, np.zeros(3, np.uint32))
    hub.add(0, vectors(1)[0])
    with pytest.raises(FileError, match="client 0 has no vector to send"):
        hub.add(0, vectors(1)[0])


def test_a_threshold_of_one_is_refused():
    person = Participant(0, agreement=Toy(), entropy=entropy())
    with pytest.raises(OptionError, match="threshold=1 must be a whole number of at least 2"):
        person.shares({0: person.keys()}, threshold=1)


def test_x25519_agrees_and_opens_the_sum():
    pytest.importorskip("cryptography", reason="needs the extra federated")
    curve = X25519()
    a, b = curve.secret(entropy(1)), curve.secret(entropy(2))
    assert curve.agree(a, curve.public(b)) == curve.agree(b, curve.public(a))
    with pytest.raises(FileError, match="a public key is none"):
        curve.agree(a, bytes(32))
    given = vectors(6)
    found = opened(given, silent={2}, agreement=curve)
    assert np.array_equal(found, summed(given, {0, 1, 3, 4, 5}))


def test_without_the_extra_it_says_which(monkeypatch):
    monkeypatch.setitem(
        __import__("sys").modules, "cryptography.hazmat.primitives.asymmetric", None
    )
    with pytest.raises(MissingExtra, match=r"tersor\[federated\]"):
        X25519()
