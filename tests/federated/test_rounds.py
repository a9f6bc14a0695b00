"""Federated averaging: the algorithm written out, clients that come late, all bytes counted."""

import copy

import pytest
import torch
from torch import nn

from federated.worlds import accuracy, drawn, net, normed, tasks, trained, world
from tersor.errors import FileError, ModelError, OptionError, TaskError
from tersor.federated import (
    Client,
    Local,
    Packing,
    Plain,
    Privacy,
    Server,
    Simulation,
    clients_of,
    federate,
    lossy,
)
from tersor.federated.layout import layout_of, state_of
from tersor.task import classification


def test_it_does_what_the_algorithm_written_out_does():
    model, done = trained(rounds=3)
    twin, _, clients = world()
    shared = copy.deepcopy(twin)
    for round_ in range(3):
        found = []
        for client, task in zip(clients, tasks(), strict=True):
            local = copy.deepcopy(shared)
            client.round = round_
            for x, y in task.train(client._drawn_from()):
                local.zero_grad()
                nn.functional.cross_entropy(local(x), y).backward()
                with torch.no_grad():
                    for p in local.parameters():
                        p -= 0.1 * p.grad
            found.append((client.samples, local))
        total = sum(samples for samples, _ in found)
        with torch.no_grad():
            for i, p in enumerate(shared.parameters()):
                p.copy_(sum(n / total * list(m.parameters())[i] for n, m in found))
    for a, b in zip(model.parameters(), shared.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert done.rounds[-1].judged > 0.8


def test_packed_updates_learn_what_floats_do_in_far_fewer_bytes():
    wide = nn.Sequential(nn.Linear(2, 200), nn.ReLU(), nn.Linear(200, 200), nn.Linear(200, 3))
    _, plain = trained(rounds=6, model=copy.deepcopy(wide))
    _, packed = trained(
        rounds=6, model=copy.deepcopy(wide), up=Packing(2, keep=0.1), down=Packing(3)
    )
    assert packed.rounds[-1].judged >= plain.rounds[-1].judged - 0.03
    assert packed.bytes_up < plain.bytes_up / 30
    # Whole states are sent in the first round alone.
    later = [sum(r.bytes_down for r in done.rounds[1:]) for done in (packed, plain)]
    assert later[0] < later[1] / 8


def test_bytes_are_those_of_the_messages():
    seen = []
    carried = Simulation.ask

    class Counting(Simulation):
        def ask(self, round_, step, messages):
            answers = carried(self, round_, step, messages)
            seen.append((messages, answers.messages))
            return answers

    _, server, clients = world(up=Packing(), down=Packing())
    done = federate(server, Counting([Plain(c) for c in clients]), rounds=3, generator=drawn())
    for result, (down, up) in zip(done.rounds, seen, strict=True):
        assert result.bytes_down == sum(len(message) for message in down.values())
        assert result.bytes_up == sum(len(message) for message in up.values())
    assert (done.bytes_down, done.bytes_up) == (
        sum(r.bytes_down for r in done.rounds),
        sum(r.bytes_up for r in done.rounds),
    )


def test_all_clients_hold_the_server_state_bit_for_bit():
    _, server, clients = world(up=Packing(), down=Packing(2, keep=0.2))
    fleet = Simulation([Plain(client) for client in clients])
    federate(server, fleet, rounds=5, fraction=0.6, generator=drawn())
    for number, client in enumerate(clients):
        client.receive(server.download(number))
        assert all(a.equal(b) for a, b in zip(client._state, server.state, strict=True))


def test_negative_zeros_are_no_other_state():
    model = net()
    with torch.no_grad():
        model[0].bias.zero_().neg_()
    _, server, clients = world(model=model)
    clients[0].receive(server.download(0))
    assert clients[0].version == 0


def test_a_client_that_missed_rounds_gets_the_changes_and_a_new_one_the_state():
    _, server, clients = world(up=Packing(), down=Packing(2, keep=0.02))
    fleet = Simulation([Plain(client) for client in clients])
    federate(server, fleet, rounds=1, generator=drawn())
    federate(server, Simulation([Plain(clients[0])]), rounds=2, generator=drawn())
    late, new = server.download(4), server.download(99)
    # The start in 8 bits and all changes since.
    assert len(late) < len(new) < len(Server(net(1)).download(0))
    clients[4].receive(late)
    assert clients[4].version == 3
    stranger = Client(tasks()[0], net())
    with pytest.raises(FileError, match="changes state 0 and this client holds None"):
        stranger.receive(late)
    stranger.receive(new)
    assert all(a.equal(b) for a, b in zip(stranger._state, clients[4]._state, strict=True))


def test_a_lost_update_is_owed_no_more_than_before():
    _, server, clients = world(up=Packing(2, keep=0.1), down=Packing())
    client = clients[0]
    client.receive(server.download(0))
    server.read(0, client.update())
    owed = [tensor.clone() for tensor in client._packer.residual]
    server.advance(None)
    client.receive(server.download(0))
    assert all(a.equal(b) for a, b in zip(client._packer.residual, owed, strict=True))
    client.update()
    assert not all(a.equal(b) for a, b in zip(client._packer.residual, owed, strict=True))
    # The server never saw that one, and says so.
    server.advance(None)
    client.receive(server.download(0))
    assert all(a.equal(b) for a, b in zip(client._packer.residual, owed, strict=True))


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 5), (0.4, 2), (0.5, 3), (0.01, 1)])
def test_a_fraction_of_the_clients_is_asked(fraction, count):
    _, done = trained(fraction=fraction, rounds=6)
    assert {len(result.chosen) for result in done.rounds} == {count}
    if count < 5:
        assert len({tuple(result.chosen) for result in done.rounds}) > 1


def test_clients_drop_out_in_the_middle_of_a_round():
    _, done = trained(network=lossy(0.3, drawn(7)), rounds=10, up=Packing(), down=Packing())
    lost = sum(len(result.silent) for result in done.rounds)
    assert 5 <= lost <= 25
    assert all(len(r.counted) + len(r.silent) == len(r.chosen) for r in done.rounds)
    assert done.rounds[-1].judged > 0.8


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    def said(seed):
        messages = []

        def network(round_, client, step, message):
            messages.append(message)
            return message

        trained(network=network, up=Packing(feedback=False), fraction=0.6, seed=seed, rounds=3)
        return messages

    assert said(1) == said(1)
    assert said(1) != said(2)


def test_layers_that_draw_draw_the_same():
    def run():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        torch.rand(int(torch.randint(9, ())) + 1)
        return trained(model=model, rounds=2)[0]

    assert all(a.equal(b) for a, b in zip(run().parameters(), run().parameters(), strict=True))


def test_statistics_of_batch_norms_are_averaged_exactly():
    model, done = trained(model=normed(), up=Packing(2), down=Packing(2), rounds=4)
    assert float(model[1].running_var.min()) > 0
    assert not model[1].running_mean.equal(torch.zeros(16))
    assert accuracy(model.eval()) > 0.8
    assert not done.rounds[-1].refused


def test_a_negative_variance_is_refused():
    _, server, clients = world(model=normed())
    clients[1].trained = lambda: [
        *(torch.zeros(shape) for shape in server.layout.shapes[:-1]),
        torch.full(server.layout.shapes[-1], -2.0),
    ]
    fleet = Simulation([Plain(client) for client in clients])
    done = federate(server, fleet, rounds=1, generator=drawn())
    assert "has a variance of -2" in done.rounds[0].refused[1]
    assert len(done.rounds[0].counted) == 4


def test_a_client_whose_training_fails_is_silent_with_the_reason():
    _, server, clients = world()
    clients[2]._trainer = Local(rate=1e30)
    fleet = Simulation([Plain(client) for client in clients])
    done = federate(server, fleet, rounds=1, generator=drawn())
    assert "training stopped in step" in done.rounds[0].silent[2]
    assert len(done.rounds[0].counted) == 4


def test_a_client_goes_on_from_what_was_stored():
    def run(restart):
        _, server, clients = world(up=Packing(2, keep=0.1), down=Packing())
        members = [Plain(client) for client in clients]
        for _ in range(3):
            if restart:
                fresh = world(up=Packing(2, keep=0.1), down=Packing())[2]
                for member, client in zip(members, fresh, strict=True):
                    client.restore(member.client.store())
                    member.client = client
            federate(server, Simulation(members), rounds=1, generator=drawn())
        return server.state

    assert all(a.equal(b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("stored", [b"", b"x" * 100, (2**40).to_bytes(8, "little") + b"{}"])
def test_what_is_no_stored_client_is_refused(stored):
    with pytest.raises(FileError, match="no client of this network"):
        world()[2][0].restore(stored)


def test_a_stored_client_of_other_shapes_is_refused():
    other = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(FileError, match=r"no client of this network .*\(8, 2\).* where \(16, 2\)"):
        world()[2][0].restore(world(model=other)[2][0].store())


def test_frozen_and_tied_weights_are_exchanged_once_or_not_at_all():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert layout_of(model).shapes == ((4, 4),)
    model = net()
    model[0].requires_grad_(False)
    assert layout_of(model).shapes == ((3, 16), (3,))
    assert len(state_of(model, layout_of(model))) == 2


class Masked(nn.Module):
    """Adds a mask that it stores, and frequencies that it makes anew."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("rates", torch.arange(3.0), persistent=False)

    def forward(self, x):
        return (self.linear(x)[:, None] + self.mask).exp().sum(-1) * self.rates


def test_constants_are_no_statistics():
    layout = layout_of(Masked())
    assert (layout.shapes, layout.trained) == (((3, 2), (3,)), 2)
    # So they are no obstacle to protection, and nothing is sent of them.
    done = federated(world={"model": Masked()}, protection=Privacy(1.0, 1.0))
    assert done.rounds[0].counted == [0, 1, 2, 3, 4]
    # A statistic that has run away since is one all the same.
    wild = normed()
    layout = layout_of(wild)
    count = len(state_of(wild, layout))
    wild[1].running_var.fill_(torch.inf)
    assert len(state_of(wild, layout)) == count == len(layout.shapes) > layout.trained
    assert layout_of(wild) == layout


def test_each_client_draws_for_itself_and_remembers_how():
    packing = Packing(2, feedback=False)
    server = Server(net())

    def updated(client):
        client.receive(server.download(0))
        return client.update()

    first, second = (Client(tasks()[0], net(), packing=packing) for _ in range(2))
    assert updated(first) != updated(second)
    # One whose process ends between two messages is another object each time.
    again = Client(tasks()[0], net(), packing=packing)
    again.restore(first.store())
    assert updated(again) == updated(first)


def federated(**options):
    _, server, clients = world(**options.pop("world", {}))
    fleet = Simulation([Plain(client) for client in clients])
    given = {"rounds": 1, "generator": drawn()} | options
    return federate(server, fleet, **given)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: federated(rounds=0), OptionError, "rounds=0 must be a whole number of at least"),
        (lambda: federated(fraction=0), OptionError, "fraction=0 must be above 0 and at most 1"),
        (lambda: federated(fraction=1.2), OptionError, r"fraction=1\.2 must be"),
        (lambda: federated(protection="secure"), OptionError, "must be a Privacy, a Secure or No"),
        (
            lambda: federated(world={"model": normed()}, protection=Privacy(1.0, 1.0)),
            ModelError,
            "2 tensors of statistics, .* use group norms",
        ),
        (lambda: Simulation([]), OptionError, "leaves nobody to train"),
        (lambda: Local(epochs=0), OptionError, "epochs=0"),
        (lambda: Local(rate=-1), OptionError, "rate=-1 must be above 0"),
        (lambda: Local(momentum=1.0), OptionError, r"momentum=1\.0 must be"),
        (lambda: lossy(2.0, drawn()), OptionError, r"share=2\.0"),
        (lambda: Server(net(), longest=0), OptionError, "longest=0"),
        (lambda: Server(net(), most_samples=0), OptionError, "most_samples=0"),
        (lambda: Server(net().requires_grad_(False)), ModelError, "nothing to exchange"),
        (
            lambda: clients_of(
                net(), [classification(test=(torch.rand(4, 2), [0, 1, 2, 0]))], generator=drawn()
            ),
            TaskError,
            "a client needs data",
        ),
        (lambda: world()[2][0].update(), FileError, "holds no state yet"),
        (lambda: Plain(world()[2][0]).answer("dance", b""), FileError, "no step 'dance'"),
    ],
)
def test_wrong_use_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()
