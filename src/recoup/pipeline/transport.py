"""How packets pass between neighbouring ranks of a pipeline: four calls, over queues, shared memory or a network.

A packet is a tuple of tensors and travels as one message. Those of one direction arrive in the order in which they were
sent.
"""

import errno
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from socket import socket
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from recoup.errors import RecoupError
from recoup.pipeline import shared
from recoup.pipeline.packets import (
    HEADER,
    Kinds,
    Packet,
    announced,
    header,
    kinds_of,
    length,
    members,
    refuse_others,
)

Lines = dict[tuple[str, int], socket]  # by ("in" | "out", the neighbour's rank less one's own)


class Transport(Protocol):
    """A rank's links to the one before and the one after it."""

    def send_activation(self, x: Packet) -> None:
        """To the next rank."""
        ...

    def receive_activation(self) -> Packet:
        """From the rank before."""
        ...

    def send_gradient(self, g: Packet) -> None:
        """To the rank before."""
        ...

    def receive_gradient(self) -> Packet:
        """From the next rank."""
        ...


class LocalTransport:
    """Queues within one process."""

    def __init__(self, links: list[tuple[deque, deque]], rank: int) -> None:
        self._links, self._rank = links, rank

    @classmethod
    def chain(cls, ranks: int) -> "list[LocalTransport]":
        """A transport for every rank of a pipeline."""
        links: list[tuple[deque, deque]] = [(deque(), deque()) for _ in range(ranks)]
        return [cls(links, rank) for rank in range(ranks)]

    def send_activation(self, x: Packet) -> None:
        """See `Transport`."""
        self._links[self._rank][0].append(tuple(part.detach().clone() for part in x))

    def receive_activation(self) -> Packet:
        """See `Transport`."""
        return self._links[self._rank - 1][0].popleft()

    def send_gradient(self, g: Packet) -> None:
        """See `Transport`."""
        self._links[self._rank - 1][1].append(tuple(part.detach().clone() for part in g))

    def receive_gradient(self) -> Packet:
        """See `Transport`."""
        return self._links[self._rank][1].popleft()


class DistributedTransport:
    """Between the processes of torch.distributed.

    Neighbours with CPUs of one machine have memory in common (`shared`); others send point to point, in a process group
    for each direction. The first packet of a direction is preceded by a header with its dtypes and shapes; all others
    are alike. A receipt is posted as soon as the one before is done, if `expect` says that there will be one.

    Args:
        timeout: how long a rank waits for its neighbour.
        device: of the tensors.

    Raises:
        RecoupError: in a send, receive or barrier, when another rank is gone or silent for that long; of a neighbour
            the message names it.
    """

    def __init__(self, timeout: timedelta, device: torch.device) -> None:
        self.rank, self.size, self.device, self._timeout = dist.get_rank(), dist.get_world_size(), device, timeout
        ranks = list(range(self.size))
        with self._blamed("join all ranks"):
            self._groups: list[Any] = [dist.new_group(ranks, timeout=timeout) for _ in range(3)]
        forward, backward, self._all = self._groups
        lines = self._lines()
        self._out = {"activation": self._sender(forward, 1, lines), "gradient": self._sender(backward, -1, lines)}
        self._in = {"activation": self._receiver(forward, -1, lines), "gradient": self._receiver(backward, 1, lines)}

    def _lines(self) -> "Lines":
        """Connections to the neighbours on this machine."""
        if self.size == 1 or dist.get_backend(self._all) != "gloo":
            return {}
        here = shared.machine() if self.device.type == "cpu" else None
        try:
            listener = None if here is None else shared.Listener()
        except OSError as error:
            raise self.blamed(abs(self.rank - 1), "listen for", error) from None
        told: list[Any] = [None] * self.size
        try:
            with self._blamed("exchange addresses"):
                dist.all_gather_object(told, (here, listener and listener.name), group=self._all)
            near = [r for r in (self.rank - 1, self.rank + 1) if 0 <= r < self.size and told[r][0] == here]
            return {} if listener is None else self._connected(listener, {rank: told[rank][1] for rank in near})
        finally:
            if listener is not None:
                listener.close()

    def _connected(self, listener: shared.Listener, near: dict[int, str]) -> "Lines":
        """One for activations and one for gradients with each; who comes first makes them, in this order."""
        patience = self._timeout.total_seconds()
        found: Lines = {}
        peer = self.rank + 1
        try:
            if peer in near:
                found["out", 1], found["in", 1] = (shared.connect(near[peer], patience) for _ in range(2))
            peer = self.rank - 1
            if peer in near:
                found["in", -1], found["out", -1] = listener.accept(2, patience)
        except OSError as error:
            for line in found.values():
                line.close()
            raise self.blamed(peer, "connect to", error) from None
        return found

    def _sender(self, group: Any, step: int, lines: "Lines") -> "shared.Sender | _Sender":
        line = lines.get(("out", step))
        if line is None:
            return _Sender(self, group, step)
        return shared.Sender(line, self.rank, lambda what, error: self.blamed(self.rank + step, what, error))

    def _receiver(self, group: Any, step: int, lines: "Lines") -> "shared.Receiver | _Receiver":
        line, patience = lines.get(("in", step)), self._timeout.total_seconds()
        if line is None:
            return _Receiver(self, group, step)
        return shared.Receiver(line, patience, lambda what, error: self.blamed(self.rank + step, what, error))

    def __enter__(self) -> "DistributedTransport":
        return self

    def __exit__(self, *_: object) -> None:
        """End the connections: neighbours that still wait see it at once."""
        for end in (*self._out.values(), *self._in.values()):
            end.close()

    def send_activation(self, x: Packet) -> None:
        """See `Transport`."""
        self._out["activation"].send(x)

    def receive_activation(self) -> Packet:
        """See `Transport`."""
        return self._in["activation"].receive()

    def send_gradient(self, g: Packet) -> None:
        """See `Transport`."""
        self._out["gradient"].send(g)

    def receive_gradient(self) -> Packet:
        """See `Transport`."""
        return self._in["gradient"].receive()

    def expect(self, activations: int, gradients: int) -> None:
        """How many packets are still to come, so that no receipt is posted for one that will not."""
        self._in["activation"].expect(activations)
        self._in["gradient"].expect(gradients)

    def barrier(self, what: str) -> None:
        """Wait for all ranks; ``what`` they are doing, for the error."""
        with self._blamed(what):
            work: Any = dist.barrier(group=self._all, async_op=True)
            work.wait(self._timeout)

    def broadcast(self, x: Tensor, owner: int) -> None:
        """A rank's tensor to all ranks, in place."""
        with self._blamed(f"share rank {owner}'s weights"):
            work: Any = dist.broadcast(x, owner, group=self._all, async_op=True)
            work.wait(self._timeout)

    def close(self) -> None:
        """Give the groups back; everything must have arrived."""
        self.barrier("finish")
        for group in self._groups:
            dist.destroy_process_group(group)

    @contextmanager
    def _blamed(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise RecoupError(
                f"pipeline: rank {self.rank} could not {what} with all {self.size} ranks: one died, or is stuck for "
                f"more than {self._timeout.total_seconds():g} s ({_first_line(error)})"
            ) from None

    def settle(self) -> None:
        """Wait until everything sent has left."""
        for sender in self._out.values():
            sender.settle()

    def wait(self, work: Any, peer: int, what: str) -> None:
        """Finish a transfer, or say whose fault it is that it cannot."""
        try:
            work.wait(self._timeout)
        except (RuntimeError, ValueError) as error:
            raise self.blamed(peer, what, error) from None

    def blamed(self, peer: int, what: str, error: Exception) -> RecoupError:
        """The error of a transfer with a neighbour."""
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            why = "no file descriptor is left: close files, or raise the limit with ulimit -n"
        else:
            why = f"it died, or is stuck for more than {self._timeout.total_seconds():g} s"
        return RecoupError(f"pipeline: rank {self.rank} could not {what} rank {peer}: {why} ({_first_line(error)})")


class _Sender:
    """One direction out: a few transfers may be under way."""

    MOST = 4

    def __init__(self, owner: DistributedTransport, group: Any, step: int) -> None:
        self._owner, self._group, self._peer = owner, group, owner.rank + step
        self._kinds: Kinds | None = None
        self._under_way: deque[tuple[Any, Tensor]] = deque()

    def send(self, packet: Packet) -> None:
        kinds = kinds_of(packet)
        if self._kinds is None:
            told = header(kinds)
            self._kinds = kinds
            self._post(told.to(self._owner.device))
        refuse_others(kinds, self._kinds, self._owner.rank)
        message = torch.empty(length(kinds), dtype=torch.uint8, device=self._owner.device)
        for member, x in zip(members(message, kinds), packet, strict=True):
            member.copy_(x.detach())
        self._post(message)
        self._settle(self.MOST)

    def settle(self) -> None:
        self._settle(0)

    def _settle(self, most: int) -> None:
        while len(self._under_way) > most:
            work, _ = self._under_way.popleft()
            self._owner.wait(work, self._peer, "send to")

    def close(self) -> None:
        """The group is the owner's."""

    def _post(self, x: Tensor) -> None:
        try:
            work = dist.isend(x, self._peer, group=self._group)
        except (RuntimeError, ValueError) as error:
            raise self._owner.blamed(self._peer, "send to", error) from None
        self._under_way.append((work, x))


class _Receiver:
    """One direction in: a receipt is begun early, so that it proceeds while the rank computes."""

    def __init__(self, owner: DistributedTransport, group: Any, step: int) -> None:
        self._owner, self._group, self._peer = owner, group, owner.rank + step
        self._kinds: Kinds | None = None
        self._posted: tuple[Any, Packet] | None = None
        self._remaining = 0

    def expect(self, count: int) -> None:
        self._remaining = count

    def receive(self) -> Packet:
        if self._kinds is None:
            told = torch.empty(HEADER, dtype=torch.int64, device=self._owner.device)
            self._owner.wait(self._post(told), self._peer, "receive from")
            self._kinds = announced(told)
        work, packet = self._posted or self._begin(self._kinds)
        self._posted = None
        self._owner.wait(work, self._peer, "receive from")
        self._remaining -= 1
        if self._remaining > 0:
            self._posted = self._begin(self._kinds)
        return packet

    def _begin(self, kinds: Kinds) -> tuple[Any, Packet]:
        message = torch.empty(length(kinds), dtype=torch.uint8, device=self._owner.device)
        return self._post(message), members(message, kinds)

    def close(self) -> None:
        """The group is the owner's."""

    def _post(self, buffer: Tensor) -> Any:
        try:
            return dist.irecv(buffer, self._peer, group=self._group)
        except (RuntimeError, ValueError) as error:
            raise self._owner.blamed(self._peer, "receive from", error) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def refuse_uninitialized(what: str) -> None:
    """Raise unless torch.distributed is there and initialized."""
    if not dist.is_available() or not dist.is_initialized():
        raise RecoupError(
            f"pipeline.{what}: torch.distributed is not initialized: start with torchrun and call "
            "pipeline.runtime.initialize()"
        )
