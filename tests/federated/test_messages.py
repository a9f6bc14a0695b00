"""Messages from strangers: what a server counts, and what a client takes over."""

import struct
import zlib

import pytest
import torch

from federated.worlds import drawn, net, tasks, trained, world
from tersor.errors import FileError
from tersor.federated import Client, Packing, Plain, Server, Simulation, federate
from tersor.federated.layout import identity, layout_of
from tersor.federated.messages import (
    FULL,
    MOST_BODIES,
    Download,
    LostError,
    read_download,
    sealed,
    write_download,
    write_update,
)
from tersor.federated.packing import Packer


def honest(scale=0.1, **options):
    """A server, and an update that it counts."""
    _, server, _ = world(**options)
    change = [torch.full(shape, scale) for shape in server.layout.shapes]
    body = Packer(server.layout, None, drawn()).pack(change)
    return server, write_update(server.round, server.identity, 10, body)


def resealed(message, at, content):
    """A forger knows how to compute a checksum."""
    inner = message[:-4]
    return sealed(inner[:at] + content + inner[at + len(content) :])


def test_an_honest_update_is_read():
    server, message = honest()
    update = server.read(0, message)
    assert update.samples == 10
    assert all(bool((tensor == torch.tensor(0.1)).all()) for tensor in update.change)


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (lambda m: b"", "damaged on its way"),
        (lambda m: m[:20], "damaged on its way"),
        (lambda m: m + b"\0", "damaged on its way"),
        (lambda m: m[:30] + bytes([m[30] ^ 1]) + m[31:], "damaged on its way"),
        (lambda m: m + bytes(10**6), "bytes where .* are the most"),
        (lambda m: resealed(m, 0, b"pkl!"), "is no update of a tersor client"),
        (lambda m: sealed(b"tfu1"), "is no update"),
        (lambda m: resealed(m, 4, struct.pack("<I", 7)), "of round 7 and not of 0"),
        (lambda m: resealed(m, 8, bytes(8)), "starts from another state"),
        (lambda m: resealed(m, 16, struct.pack("<I", 0)), "claims 0 samples"),
        (lambda m: resealed(m, 16, struct.pack("<I", 2**30)), "claims 1073741824 samples"),
        (lambda m: resealed(m, 20, b"\x0c"), "codes of 12 bits"),
        (lambda m: sealed(m[:-4] + b"more"), "goes on after its end"),
    ],
)
def test_a_hostile_update_is_refused_with_a_sentence(alter, said):
    server, message = honest()
    with pytest.raises(FileError, match=said):
        server.read(0, alter(message))


def test_an_update_that_is_too_long_is_refused():
    server, message = honest(scale=5.0, longest=2.0)
    with pytest.raises(FileError, match="long, where 2 is the longest allowed"):
        server.read(0, message)
    server, message = honest(scale=0.01, longest=2.0)
    assert server.read(0, message).samples == 10


def test_the_round_goes_on_without_the_hostile_and_the_silent():
    def network(round_, client, step, message):
        if client == 1:
            return message[:50]
        if client == 2:
            return resealed(message, 16, struct.pack("<I", 2**31))
        return None if client == 3 else message

    model, done = trained(network=network, up=Packing(), down=Packing())
    for result in done.rounds:
        assert result.counted == [0, 4]
        assert set(result.refused) == {1, 2}
        assert result.silent == {3: "never answered"}
    assert "checksum" in done.rounds[0].refused[1]
    assert done.rounds[-1].judged > 0.8
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_round_without_any_update_changes_nothing():
    model, done = trained(network=lambda *_: None, rounds=2)
    assert all(a.equal(b) for a, b in zip(model.parameters(), net().parameters(), strict=True))
    assert [result.counted for result in done.rounds] == [[], []]


@pytest.mark.parametrize(
    "alter",
    [
        lambda m: m[:-1],
        lambda m: resealed(m, 0, b"nope"),
        lambda m: resealed(m, 12, struct.pack("<I", 5)),
        lambda m: resealed(m, 16, bytes(8)),
        lambda m: sealed(m[:-4] + b"\xff\xff\xff"),
        lambda m: sealed(m[:24]),
        lambda m: m + bytes(10**6),
    ],
)
def test_a_client_refuses_a_download_that_is_none(alter):
    _, server, clients = world()
    with pytest.raises(FileError):
        clients[0].receive(alter(server.download(0)))
    assert clients[0].version is None
    clients[0].receive(server.download(0))
    assert clients[0].version == 0


def test_a_download_says_what_it_leads_to():
    _, server, _ = world(down=Packing())
    found = read_download(server.download(0), layout_of(net()))
    assert (found.round, found.counted, len(found.bodies)) == (0, 0, 1)
    assert found.identity == identity(server.state)


def test_no_altered_message_brings_a_server_down():
    _, server, clients = world(up=Packing(3, keep=0.2))
    clients[0].receive(server.download(0))
    message = clients[0].update()
    generator = drawn()
    for _ in range(300):
        altered = bytearray(message[:-4])
        place = int(torch.randint(len(altered), (), generator=generator))
        altered[place] = int(torch.randint(256, (), generator=generator))
        forged = bytes(altered) + struct.pack("<I", zlib.crc32(altered))
        try:
            update = server.read(0, forged)
        except FileError:
            continue
        assert all(bool(tensor.isfinite().all()) for tensor in update.change)
    federate(server, Simulation([Plain(clients[0])]), rounds=1, generator=drawn())


def test_a_client_that_lost_its_state_is_sent_it_whole_and_takes_part_again():
    _, server, clients = world(down=Packing())
    members = [Plain(client) for client in clients]

    def run():
        return federate(server, Simulation(members), rounds=1, generator=drawn()).rounds[0]

    assert run().counted == [0, 1, 2, 3, 4]
    members[1] = Plain(Client(tasks()[1], net()))
    second = run()
    assert second.counted == [0, 2, 3, 4]
    assert "the client lost the state that its changes begin with" in second.refused[1]
    assert not second.silent
    assert run().counted == [0, 1, 2, 3, 4]
    members[1].client.receive(server.download(1))
    assert all(a.equal(b) for a, b in zip(members[1].client._state, server.state, strict=True))


def test_a_client_with_a_damaged_state_is_sent_it_whole():
    _, server, clients = world(down=Packing())
    fleet = Simulation([Plain(client) for client in clients])
    federate(server, fleet, rounds=1, generator=drawn())
    clients[2]._state[0][0, 0] += 1
    with pytest.raises(LostError, match="changes another state 0 than this client holds"):
        clients[2].receive(server.download(2))
    done = federate(server, fleet, rounds=2, generator=drawn())
    assert [2 in result.counted for result in done.rounds] == [False, True]


def test_an_old_call_for_help_changes_nothing():
    _, server, clients = world(down=Packing())
    fleet = Simulation([Plain(client) for client in clients])
    federate(server, fleet, rounds=2, generator=drawn())
    before = server.download(0)
    with pytest.raises(FileError, match="no update of a tersor client"):
        server.read(0, LostError("", 1).answer)
    assert server.download(0) == before


@pytest.mark.parametrize(
    ("round_", "first", "bodies"),
    [(0, FULL, 0), (0, FULL, 2), (3, FULL, 2), (3, 1, 3), (3, 1, 1), (3, 4, 1), (400, 0, 400)],
)
def test_bodies_must_be_those_of_the_rounds_they_cover(round_, first, bodies):
    message = write_download(Download(round_, 0, first, bytes(8), [b"x"] * bodies))
    with pytest.raises(FileError, match=f"the download has {bodies} bodies, which is not what"):
        read_download(message, layout_of(net()))


@pytest.mark.parametrize(("first", "bodies"), [(FULL, 1), (FULL, 4), (1, 2), (3, 0)])
def test_bodies_of_a_whole_state_or_of_each_round_are_read(first, bodies):
    message = write_download(Download(3, 0, first, bytes(8), [b"x"] * bodies))
    assert len(read_download(message, layout_of(net())).bodies) == bodies


def test_a_server_sends_no_more_bodies_than_clients_read():
    model = torch.nn.Linear(300, 300)
    server = Server(model, packing=Packing(2, keep=1e-5))
    for _ in range(MOST_BODIES + 3):
        server.advance([torch.zeros(shape) for shape in server.layout.shapes])
    found = read_download(server.download(0), server.layout)
    assert (found.first, len(found.bodies)) == (FULL, 1)
    server.answered(0)
    server._held[0] -= MOST_BODIES - 1
    found = read_download(server.download(0), server.layout)
    assert (found.first, len(found.bodies)) == (4, MOST_BODIES - 1)


def test_without_a_limit_of_its_own_a_server_refuses_what_no_training_gives():
    server, message = honest(scale=3e3)
    with pytest.raises(FileError, match="is the longest allowed; raise longest if honest"):
        server.read(0, message)
    server, message = honest(scale=100.0)
    assert server.read(0, message).samples == 10
    server, message = honest(scale=3e3, longest=1e9)
    assert server.read(0, message).samples == 10
