"""A server that is killed goes on to the same weights, and reads no file but its own."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from federated.worlds import Toy, drawn, entropy, net, normed, world
from tersor.errors import OptionError
from tersor.federated import (
    Hidden,
    Packing,
    Plain,
    Privacy,
    Secure,
    Simulation,
    federate,
)
from tersor.train import checkpoint

SECURE = Secure(largest=0.5, threshold=2)


class Killed(Exception):
    """As by a signal: nothing of tersor catches it."""


def killer(round_, client):
    """A network on which the server dies when this client answers, once; 3 is silent at times."""
    left = [True]

    def network(number, who, step, message):
        if (number, who) == (round_, client) and left:
            left.pop()
            raise Killed
        return None if who == 3 and number % 2 else message

    return network


def run(folder, network, *, kills=0, rounds=5, protection=None, fraction=1.0, **options):
    """Server, result. The server and its network are new behind each kill, the clients stay."""
    model = options.pop("model", net())
    _, _, clients = world(**options, model=copy.deepcopy(model))
    members = [Plain(client) for client in clients]
    if isinstance(protection, Secure):
        members = [
            Hidden(i, client, protection, agreement=Toy(), entropy=entropy(i))
            for i, client in enumerate(clients)
        ]
    fleet = Simulation(members, network)
    for life in range(kills + 1):
        server = world(**options, model=copy.deepcopy(model), generator=drawn(4))[1]
        given = {
            "rounds": rounds,
            "fraction": fraction,
            "protection": protection,
            "agreement": Toy(),
            "judge": lambda server=server: float(server.state[0].sum()),
            "folder": folder,
            "generator": drawn(2),
        }
        if life < kills:
            with pytest.raises(Killed):
                federate(server, fleet, **given)
        else:
            return server, federate(server, fleet, **given)
    raise AssertionError


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"up": Packing(2, keep=0.1), "down": Packing(2, keep=0.2), "fraction": 0.6},
        {"up": Packing(3, feedback=False), "down": Packing(3, feedback=False)},
        {"model": normed(), "up": Packing(2), "down": Packing(2), "fraction": 0.8},
        {"protection": Privacy(1.0, 0.5), "fraction": 0.8, "up": Packing(2)},
        {"protection": SECURE, "down": Packing(2), "clients": 3},
    ],
)
def test_a_killed_federation_goes_on_to_the_same_bits(tmp_path, options):
    whole, calm = run(None, killer(99, 0), **options)
    calls = []
    kill = killer(2, calm.rounds[2].chosen[-1])

    def network(round_, client, step, message):
        calls.append(round_)
        return kill(round_, client, step, message)

    resumed, done = run(tmp_path, network, kills=1, **options)
    assert all(a.equal(b) for a, b in zip(whole.state, resumed.state, strict=True))
    assert done == calm
    # What was done before is not asked for again.
    assert 0 not in calls[calls.index(1) :]


def test_the_folder_counts_rounds_and_what_is_done_is_not_done_again(tmp_path):
    network = killer(99, 0)
    server, three = run(tmp_path, network, rounds=3)
    again, same = run(tmp_path, lambda *_: pytest.fail("nobody is asked"), rounds=3)
    assert three == same
    assert all(a.equal(b) for a, b in zip(server.state, again.state, strict=True))
    with pytest.raises(OptionError, match="rounds=2 are fewer than the 3 that"):
        run(tmp_path, network, rounds=2)


def test_what_is_left_of_a_killed_write_is_not_read(tmp_path, monkeypatch):
    run(tmp_path, None, rounds=1)

    def killed(*_, **__):
        raise Killed

    monkeypatch.setattr(checkpoint, "save_file", killed)
    with pytest.raises(Killed):
        run(tmp_path, None, rounds=2)
    monkeypatch.undo()
    whole, _ = run(None, None, rounds=1)
    resumed, done = run(tmp_path, None, rounds=1)
    assert len(done.rounds) == 1
    assert all(a.equal(b) for a, b in zip(whole.state, resumed.state, strict=True))


def flipped(path):
    """One bit of one number: safetensors does not notice."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def foreign(path):
    checkpoint.store(path, {"step": 3, "weights": [torch.ones(3)]})


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def other_numbers(path):
    """Of the same names and shapes, behind the same plain text."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        plain = file.metadata()
    save_file({name: t * 0 for name, t in load_file(path).items()}, path, plain)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flipped, "its digest is another"),
        (other_numbers, "its digest is another"),
        (foreign, "cannot be gone on from: 'federation'"),
        (cut, "holds no training of this tersor"),
        (lambda path: path.write_bytes(b""), "holds no training of this tersor"),
        (lambda path: path.write_bytes(b"\x80\x04pickle" * 9), "holds no training"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path, damage, said):
    run(tmp_path, None, rounds=1)
    (path,) = tmp_path.iterdir()
    damage(path)
    with pytest.raises(OptionError, match=said) as refusal:
        run(tmp_path, None, rounds=2)
    assert "delete it to start anew, or name another folder" in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fraction": 0.5}, r"with fraction=1.0, not 0.5; delete it"),
        ({"protection": Privacy(1.0, 1.0)}, r"with protection=None, not Privacy\(clip=1.0"),
        ({"down": Packing(2)}, "it is of a server of None for .* and this is Packing"),
        ({"model": torch.nn.Linear(2, 3)}, "it is of a server of None for Layout"),
    ],
)
def test_another_federation_is_refused(tmp_path, options, said):
    run(tmp_path, None, rounds=1)
    with pytest.raises(OptionError, match=said):
        run(tmp_path, None, rounds=2, **options)
