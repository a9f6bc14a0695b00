"""Several passes side by side: each halts where a weight is first used, until all have come there.

So a weight can be changed on the way, knowing what all passes bring to it, and what comes after
sees the change. One pass is enough to quantize a whole network layer by layer, whatever it is
built of; the activations that are held are those of one place at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tersor.measure.products import Products
from tersor.surgery.walk import Site

Pass = Callable[[], object]
Bring = Callable[[], Tensor]
"""What a halted pass brings to the weight: (groups, rows, inputs), computed when asked for."""
Arrived = Callable[[Site, dict[int, Bring]], None]
"""Called with what each pass brings, by the number of the pass; some may not come."""


def lockstep(
    passes: Sequence[Pass], sites: Sequence[Sequence[Site]], arrived: Arrived, places: int | None
) -> None:
    """Runs all passes, one at a time, halting each at the first product of each weight.

    passes: calls of networks, without gradients
    sites: for each pass the weights to halt at, in the order in which they are met; the same number
        for all, the n-th of one being the n-th of all others
    arrived: told of the sites of the first pass
    places: of a convolution that count for each sample; None for all

    What a pass raises is raised here, once all others have been stopped.
    """
    gate = _Gate(len(passes))
    threads = torch.get_num_threads()
    workers = [
        threading.Thread(
            target=_run,
            args=(gate, number, run, _Halting(gate, number, sites[number], places), threads),
            daemon=True,
        )
        for number, run in enumerate(passes)
    ]
    for worker in workers:
        worker.start()
    try:
        _lead(gate, sites[0], arrived)
    finally:
        gate.stop()
        for worker in workers:
            worker.join()


def _lead(gate: _Gate, sites: Sequence[Site], arrived: Arrived) -> None:
    for number in range(gate.count):
        gate.resume(number)
    while gate.halted:
        # The earliest: whoever waits for a later one may still have to pass it.
        first = min(place for place, _ in gate.halted.values())
        here = {n: bring for n, (place, bring) in gate.halted.items() if place == first}
        arrived(sites[first], here)
        for number in here:
            gate.resume(number)


class _Stopped(BaseException):
    """Ends a pass whose result nobody wants any more."""


class _Gate:
    """Lets one pass run at a time.

    halted: passes that wait, with the place where they do and what they bring
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.halted: dict[int, tuple[int, Bring]] = {}
        self._turn = [threading.Semaphore(0) for _ in range(count)]
        self._back = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._stopped = False

    def resume(self, number: int) -> None:
        """Lets a pass go on to its next halt, or to its end."""
        self.halted.pop(number, None)
        self._turn[number].release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Ends all passes that have not ended yet."""
        self._stopped = True
        for turn in self._turn:
            turn.release()

    def begin(self, number: int) -> None:
        """Waits, in the thread of a pass, for its first turn."""
        self._wait(number)

    def halt(self, number: int, place: int, bring: Bring) -> None:
        """Gives the turn back until the weight at `place` has been dealt with."""
        self.halted[number] = place, bring
        self._back.release()
        self._wait(number)

    def end(self, error: BaseException | None) -> None:
        """Gives the turn back for good."""
        if error is not None and not isinstance(error, _Stopped):
            self._error = error
        self._back.release()

    def _wait(self, number: int) -> None:
        self._turn[number].acquire()
        if self._stopped:
            raise _Stopped


class _Halting(Products):  # type: ignore[no-untyped-call]
    """Halts at the first product of each weight."""

    def __init__(self, gate: _Gate, number: int, sites: Sequence[Site], places: int | None) -> None:
        super().__init__(sites, places)
        self._gate, self._number = gate, number
        self._left = {id(site): place for place, site in enumerate(sites)}

    def met(self, site: Site, values: Bring) -> None:
        place = self._left.pop(id(site), None)
        if place is not None:
            self._gate.halt(self._number, place, values)


def _run(gate: _Gate, number: int, run: Pass, halting: _Halting, threads: int) -> None:
    error: BaseException | None = None
    try:
        gate.begin(number)
        # Both belong to a thread, and this one is new.
        torch.set_num_threads(threads)
        with torch.no_grad(), halting:
            run()
    except BaseException as raised:
        error = raised
    gate.end(error)
