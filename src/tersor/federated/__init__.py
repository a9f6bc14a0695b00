"""Federated training: clients keep their data, and send few bytes about what it taught them."""

from tersor.federated.accountant import epsilon, tight_epsilon
from tersor.federated.client import Client
from tersor.federated.fleet import Fleet, Member, Plain, Simulation, clients_of, lossy
from tersor.federated.grid import Secure
from tersor.federated.hidden import Hidden
from tersor.federated.local import Local
from tersor.federated.packing import Packing
from tersor.federated.privacy import Privacy, PrivateLocal
from tersor.federated.rounds import Federated, Round, federate
from tersor.federated.server import Server
from tersor.federated.splits import by_dirichlet, by_shards

__all__ = [
    "Client",
    "Federated",
    "Fleet",
    "Hidden",
    "Local",
    "Member",
    "Packing",
    "Plain",
    "Privacy",
    "PrivateLocal",
    "Round",
    "Secure",
    "Server",
    "Simulation",
    "by_dirichlet",
    "by_shards",
    "clients_of",
    "epsilon",
    "federate",
    "lossy",
    "tight_epsilon",
]
