"""A small federation: three clouds in the plane, shared out among a few clients."""

import random

import torch
from torch import nn

from tersor.errors import FileError
from tersor.federated import Local, Plain, Server, Simulation, by_dirichlet, clients_of, federate
from tersor.task import classification


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int = 240, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]])
    return centres[labels] + 0.7 * torch.randn(count, 2, generator=drawn(seed)), labels


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def tasks(clients: int = 5, alpha: float = 1.0):
    x, y = blobs()
    parts = by_dirichlet(y, clients, alpha=alpha, generator=drawn(3))
    return [classification(train=(x[part], y[part]), batch_size=16) for part in parts]


def accuracy(model: nn.Module) -> float:
    x, y = blobs(seed=9)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def world(*, up=None, down=None, model=None, clients=5, trainer=None, **server):
    """A server and its clients."""
    model = model or net()
    made = clients_of(
        model,
        tasks(clients),
        trainer=trainer or Local(rate=0.1),
        packing=up,
        generator=drawn(1),
    )
    return model, Server(model, packing=down, **server), made


def trained(*, rounds=4, network=None, seed=2, fraction=1.0, protection=None, **options):
    model, server, clients = world(**options)
    fleet = Simulation([Plain(client) for client in clients], network)
    done = federate(
        server,
        fleet,
        rounds=rounds,
        fraction=fraction,
        protection=protection,
        judge=lambda: accuracy(model),
        generator=drawn(seed),
    )
    return model, done


class Toy:
    """Diffie-Hellman modulo a prime far too small to be safe, for want of a library."""

    secret_size = 15
    public_size = 16
    prime = 2**127 - 1

    def secret(self, entropy):
        return entropy(self.secret_size)

    def public(self, secret):
        return pow(3, int.from_bytes(secret, "little"), self.prime).to_bytes(16, "little")

    def agree(self, secret, public):
        theirs = int.from_bytes(public, "little")
        if not 1 < theirs < self.prime - 1:
            raise FileError("a public key is none; leave out who sent it")
        power = pow(theirs, int.from_bytes(secret, "little"), self.prime)
        return power.to_bytes(16, "little")


def entropy(seed: int = 0):
    return random.Random(seed).randbytes
