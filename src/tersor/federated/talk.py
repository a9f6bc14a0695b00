"""What is said in one round, counted byte by byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tersor.federated.fleet import Fleet
from tersor.federated.server import Server


@dataclass
class Talk:
    """What was said in a round, counted.

    silent, refused: why nothing was counted of a client, by number
    """

    server: Server
    fleet: Fleet
    silent: dict[int, str] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    counted: list[int] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0

    def ask(self, step: str, messages: Mapping[int, bytes]) -> dict[int, bytes]:
        """Sends messages; the answers of those that gave one."""
        self.bytes_down += sum(map(len, messages.values()))
        answers = self.fleet.ask(self.server.round, step, messages)
        self.bytes_up += sum(map(len, answers.messages.values()))
        self.silent.update(answers.silent)
        return answers.messages
