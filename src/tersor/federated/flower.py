"""Flower as the engine: its apps carry the same bytes between the same clients and server.

Flower (https://flower.ai, Apache 2.0) brings processes, TLS, signed nodes and retries. What is
sent, and what becomes of it, is tersor's: each message is one byte string in a record. A node's
client is kept in its `context.state` between messages, since processes come and go.

Imported only by name (`tersor.federated.flower`), and takes the extra `flower`. Sums are not hidden
here: `Secure` needs secrets that outlive a message, which Flower would write to disk.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tersor.errors import CompressError, FileError, MissingExtra, OptionError
from tersor.federated.client import Client
from tersor.federated.fleet import UPDATE, Answers, Fleet, Plain
from tersor.federated.options import check_count, check_number

try:
    from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise MissingExtra("flower", "flwr") from error

_RECORD, _MESSAGE, _CLIENT = "tersor", "message", "client"
_REFUSED = 1
"""Code of an error reply; the reason is beside it."""


def client_app(client_of: Callable[[Mapping[str, Any]], Client]) -> ClientApp:
    """What runs at a node.

    client_of: makes the node's client from its settings (`node_config`, where simulations put a
        "partition-id"); called for each message, so data are best read lazily

    A node whose kept client cannot be read begins anew: the server sends it the whole state.
    """
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        client = client_of(context.node_config)
        _restore(client, context)
        try:
            answer = Plain(client).answer(UPDATE, _bytes_of(message))
        except CompressError as error:
            return Message(Error(_REFUSED, str(error)), reply_to=message)
        context.state[_RECORD] = ConfigRecord({_CLIENT: client.store()})
        return Message(_record(answer), reply_to=message)

    return app


def server_app(run: Callable[[Fleet], object], *, clients: int, timeout: float = 3600) -> ServerApp:
    """What runs at the server.

    run: is given the nodes as a fleet, for `federate`
    clients: nodes that must be there before a round begins
    timeout: seconds that a round waits for nodes, and then for answers; who is later is silent
    """
    check_count("clients", clients)
    check_number("timeout", timeout)
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        run(Nodes(grid, clients=clients, timeout=timeout))

    return app


class Nodes:
    """The nodes of a Flower grid as a fleet."""

    def __init__(self, grid: Grid, *, clients: int, timeout: float) -> None:
        """As `server_app`."""
        self._grid, self._clients, self._timeout = grid, clients, timeout

    @property
    def numbers(self) -> Sequence[int]:
        """Of the nodes that are connected; waits until there are enough.

        Raises OptionError where there are too few for the whole of the timeout.
        """
        end = time.monotonic() + self._timeout
        while len(found := sorted(self._grid.get_node_ids())) < self._clients:
            if time.monotonic() >= end:
                raise OptionError(
                    f"{len(found)} nodes are connected where clients={self._clients} are needed, "
                    f"after timeout={self._timeout:g} seconds; start more nodes, or ask for fewer"
                )
            time.sleep(min(1.0, self._timeout))
        return found

    def ask(self, round_: int, step: str, messages: Mapping[int, bytes]) -> Answers:
        """See `Fleet`. Raises OptionError for the steps of `Secure`."""
        if step != UPDATE:
            raise OptionError(
                "protection=Secure(...) is not carried by Flower; use a fleet of your own, or "
                "Flower's SecAgg+ in its place"
            )
        sent = [
            Message(_record(content), number, "train", group_id=str(round_))
            for number, content in messages.items()
        ]
        found = Answers()
        for reply in self._grid.send_and_receive(sent, timeout=self._timeout):
            number = reply.metadata.src_node_id
            if number not in messages or number in found.messages:
                continue
            try:
                found.messages[number] = _bytes_of(reply)
            except CompressError as error:
                found.silent[number] = str(error)
        for number in messages:
            if number not in found.messages:
                found.silent.setdefault(number, "never answered")
        return found


def _restore(client: Client, context: Context) -> None:
    """What the node kept of its client. It begins anew where that is of no use any more."""
    record = context.state.get(_RECORD)
    if isinstance(record, ConfigRecord) and isinstance(kept := record.get(_CLIENT), bytes):
        with contextlib.suppress(FileError):
            client.restore(kept)


def _record(content: bytes) -> RecordDict:
    return RecordDict({_RECORD: ConfigRecord({_MESSAGE: content})})


def _bytes_of(message: Message) -> bytes:
    """Raises OptionError where a message holds something else."""
    if message.has_error():
        raise OptionError(message.error.reason)
    record = message.content.get(_RECORD)
    content = record.get(_MESSAGE) if isinstance(record, ConfigRecord) else None
    if not isinstance(content, bytes):
        raise OptionError("the message holds no bytes of tersor; use tersor's apps at both ends")
    return content
