"""The same rounds with Flower as the engine. Needs flwr, which the extra `flower` brings."""

import sys

import pytest
import torch

from federated.worlds import Toy, drawn, net, tasks, trained, world
from tersor.errors import MissingExtra, OptionError
from tersor.federated import Client, Local, Packing, Secure, Server, federate


def test_without_the_extra_it_says_which(monkeypatch):
    monkeypatch.delitem(sys.modules, "tersor.federated.flower", raising=False)
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    with pytest.raises(MissingExtra, match=r"tersor\[flower\]"):
        __import__("tersor.federated.flower")


def context(node, partition=0):
    from flwr.app import Context, RecordDict

    return Context(1, node, {"partition-id": partition}, RecordDict(), {})


class Wire:
    """A grid that hands each message to the app of its node."""

    def __init__(self, apps, alter=lambda reply: reply):
        self.apps, self.alter = apps, alter
        self.contexts = {node: context(node, i) for i, node in enumerate(apps)}

    def get_node_ids(self):
        return list(self.apps)

    def send_and_receive(self, messages, *, timeout=None):
        for message in messages:
            message.metadata._message_id = "a"
            node = message.metadata.dst_node_id
            reply = self.alter(self.apps[node](message, self.contexts[node]))
            if reply is not None:
                yield reply


def flown(alter=lambda reply: reply, *, rounds=3, protection=None, **options):
    from tersor.federated.flower import client_app, server_app

    model = net()
    server = Server(model, packing=Packing(), generator=drawn())
    # As `clients_of` draws them.
    g = drawn(1)
    seeds = [int(torch.randint(2**62, (), generator=g)) for _ in range(5)]

    def client_of(settings):
        number = settings["partition-id"]
        return Client(
            tasks()[number], net(), trainer=Local(rate=0.1), packing=Packing(), seed=seeds[number]
        )

    grid = Wire({100 + i: client_app(client_of) for i in range(5)}, alter)
    found = []

    def run(fleet):
        found.append(
            federate(
                server, fleet, rounds=rounds, protection=protection, generator=drawn(2), **options
            )
        )

    server_app(run, clients=5)(grid, context(0))
    return model, found[0]


@pytest.fixture
def _flwr():
    pytest.importorskip("flwr", reason="needs the extra flower")
    from flwr.supercore.task_identity import TaskIdentity

    # As Flower's own processes set it, before an app runs.
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


@pytest.mark.usefixtures("_flwr")
def test_flower_carries_the_same_bytes_to_the_same_network():
    model, done = flown()
    twin, plain = trained(rounds=3, up=Packing(), down=Packing())
    assert [r.bytes_up for r in done.rounds] == [r.bytes_up for r in plain.rounds]
    assert [r.bytes_down for r in done.rounds] == [r.bytes_down for r in plain.rounds]
    assert all(a.equal(b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.usefixtures("_flwr")
def test_silent_and_strange_nodes_are_left_out():
    from flwr.app import ConfigRecord, Message, RecordDict

    def alter(reply):
        node = reply.metadata.src_node_id
        if node == 101:
            return None
        if node == 102:
            reply.content = RecordDict({"other": ConfigRecord({"message": b"x"})})
        if node == 103:
            reply.content = RecordDict({"tersor": ConfigRecord({"message": b"x" * 30})})
        assert isinstance(reply, Message)
        return reply

    _, done = flown(alter, rounds=1)
    (result,) = done.rounds
    assert result.counted == [100, 104]
    assert result.silent[101] == "never answered"
    assert "holds no bytes of tersor" in result.silent[102]
    assert "checksum" in result.refused[103]


@pytest.mark.usefixtures("_flwr")
def test_hidden_sums_are_refused():
    with pytest.raises(OptionError, match="is not carried by Flower"):
        flown(protection=Secure(1.0), agreement=Toy())


@pytest.mark.usefixtures("_flwr")
def test_a_node_that_cannot_train_says_why():
    from tersor.federated.flower import Nodes, client_app

    client = world()[2][0]
    grid = Wire({7: client_app(lambda settings: client)})
    answers = Nodes(grid, clients=1, timeout=1).ask(0, "update", {7: b"rubbish"})
    assert "damaged" in answers.silent[7]


@pytest.mark.usefixtures("_flwr")
@pytest.mark.parametrize("lose", [lambda kept: kept.clear(), lambda kept: kept.update(client=b"x")])
def test_a_node_that_lost_its_client_begins_anew(lose):
    from tersor.federated.flower import Nodes, client_app

    def client_of(settings):
        return Client(tasks()[settings["partition-id"]], net())

    _, server, _ = world(down=Packing())
    grid = Wire({100 + i: client_app(client_of) for i in range(3)})
    fleet = Nodes(grid, clients=3, timeout=1)

    def run():
        return federate(server, fleet, rounds=1, generator=drawn()).rounds[0]

    assert run().counted == [100, 101, 102]
    lose(grid.contexts[101].state["tersor"])
    second = run()
    assert second.counted == [100, 102]
    assert "lost the state" in second.refused[101]
    assert run().counted == [100, 101, 102]


@pytest.mark.usefixtures("_flwr")
def test_nodes_that_never_come_are_not_waited_for_beyond_the_limit():
    from tersor.federated.flower import Nodes

    fleet = Nodes(Wire({7: None}), clients=2, timeout=0.05)
    said = r"1 nodes are connected where clients=2 are needed, after timeout=0\.05 seconds"
    with pytest.raises(OptionError, match=said):
        len(fleet.numbers)
