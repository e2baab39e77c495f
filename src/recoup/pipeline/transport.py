"""How packets pass between neighbouring ranks of a pipeline: four calls, over queues or torch.distributed.

A packet is a tuple of tensors and travels as one message. Those of one direction arrive in the order in which they were
sent.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from recoup.errors import RecoupError

Packet = tuple[Tensor, ...]
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8),
    *(torch.int16, torch.int8, torch.bool),
)
MEMBERS, SIZES = 16, 8  # the most tensors of a packet, and dimensions of one
HEADER = 1 + MEMBERS * (2 + SIZES)  # how many; of each dtype, dimensions, and sizes
ALIGNMENT = 64  # bytes: where members begin in a message, so that kernels find them as if they were allocated


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
    """Point to point over torch.distributed, a process group for each direction.

    The first packet of a direction is preceded by a header with its dtypes and shapes; all others are alike. A receipt
    is posted as soon as the one before is done, if `expect` says that there will be one.

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
        self._out = {"activation": _Sender(self, forward, 1), "gradient": _Sender(self, backward, -1)}
        self._in = {
            "activation": _Receiver(self, forward, -1, device),
            "gradient": _Receiver(self, backward, 1, device),
        }

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
        self._in["activation"].remaining = activations
        self._in["gradient"].remaining = gradients

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
            sender.settle(0)

    def wait(self, work: Any, peer: int, what: str) -> None:
        """Finish a transfer, or say whose fault it is that it cannot."""
        try:
            work.wait(self._timeout)
        except (RuntimeError, ValueError) as error:
            raise self.blamed(peer, what, error) from None

    def blamed(self, peer: int, what: str, error: Exception) -> RecoupError:
        """The error of a transfer with a neighbour."""
        return RecoupError(
            f"pipeline: rank {self.rank} could not {what} rank {peer}: it died, or is stuck for more than "
            f"{self._timeout.total_seconds():g} s ({_first_line(error)})"
        )


class _Sender:
    """One direction out: a few transfers may be under way."""

    MOST = 4

    def __init__(self, owner: DistributedTransport, group: Any, step: int) -> None:
        self._owner, self._group, self._peer = owner, group, owner.rank + step
        self._kinds: Kinds | None = None
        self._under_way: deque[tuple[Any, Tensor]] = deque()

    def send(self, packet: Packet) -> None:
        kinds = [(x.dtype, x.shape) for x in packet]
        if self._kinds is None:
            header = _header(kinds)
            self._kinds = kinds
            self._post(header.to(self._owner.device))
        elif kinds != self._kinds:
            raise RecoupError(
                f"pipeline: rank {self._owner.rank} would send {_shown(kinds)}, unlike the packets "
                f"before, {_shown(self._kinds)}; all samples must have the same shape"
            )
        message, members = _message(kinds, self._owner.device)
        for member, x in zip(members, packet, strict=True):
            member.copy_(x.detach())
        self._post(message)
        self.settle(self.MOST)

    def settle(self, most: int) -> None:
        while len(self._under_way) > most:
            work, _ = self._under_way.popleft()
            self._owner.wait(work, self._peer, "send to")

    def _post(self, x: Tensor) -> None:
        try:
            work = dist.isend(x, self._peer, group=self._group)
        except (RuntimeError, ValueError) as error:
            raise self._owner.blamed(self._peer, "send to", error) from None
        self._under_way.append((work, x))


class _Receiver:
    """One direction in: a receipt is begun early, so that it proceeds while the rank computes."""

    def __init__(self, owner: DistributedTransport, group: Any, step: int, device: torch.device) -> None:
        self._owner, self._group, self._peer, self._device = owner, group, owner.rank + step, device
        self._kinds: Kinds | None = None
        self._posted: tuple[Any, Packet] | None = None
        self.remaining = 0

    def receive(self) -> Packet:
        if self._kinds is None:
            header = torch.empty(HEADER, dtype=torch.int64, device=self._device)
            self._owner.wait(self._post(header), self._peer, "receive from")
            self._kinds = _announced(header)
        work, members = self._posted or self._begin(self._kinds)
        self._posted = None
        self._owner.wait(work, self._peer, "receive from")
        self.remaining -= 1
        if self.remaining > 0:
            self._posted = self._begin(self._kinds)
        return members

    def _begin(self, kinds: "Kinds") -> tuple[Any, Packet]:
        message, members = _message(kinds, self._device)
        return self._post(message), members

    def _post(self, buffer: Tensor) -> Any:
        try:
            return dist.irecv(buffer, self._peer, group=self._group)
        except (RuntimeError, ValueError) as error:
            raise self._owner.blamed(self._peer, "receive from", error) from None


Kinds = list[tuple[torch.dtype, torch.Size]]


def _header(kinds: Kinds) -> Tensor:
    if len(kinds) > MEMBERS or any(dtype not in DTYPES or len(shape) > SIZES for dtype, shape in kinds):
        raise RecoupError(
            f"pipeline: a packet of {_shown(kinds)} cannot be sent: up to {MEMBERS} tensors of up to {SIZES} dimensions"
        )
    numbers = [len(kinds)]
    for dtype, shape in kinds:
        numbers += [DTYPES.index(dtype), len(shape), *shape, *[0] * (SIZES - len(shape))]
    return torch.tensor(numbers + [0] * (HEADER - len(numbers)), dtype=torch.int64)


def _announced(header: Tensor) -> Kinds:
    count, *numbers = header.tolist()
    found: Kinds = []
    for at in range(0, count * (2 + SIZES), 2 + SIZES):
        kind, dims, *sizes = numbers[at : at + 2 + SIZES]
        found.append((DTYPES[kind], torch.Size(sizes[:dims])))
    return found


def _message(kinds: Kinds, device: torch.device) -> tuple[Tensor, Packet]:
    """Memory for a packet, and its members as views."""
    bounds, at = [], 0
    for dtype, shape in kinds:
        size = shape.numel() * dtype.itemsize
        bounds.append((at, at + size))
        at += -(-size // ALIGNMENT) * ALIGNMENT
    message = torch.empty(max(at, 1), dtype=torch.uint8, device=device)
    pairs = zip(kinds, bounds, strict=True)
    return message, tuple(message[a:b].view(dtype).view(shape) for (dtype, shape), (a, b) in pairs)


def _shown(kinds: Kinds) -> str:
    return ", ".join(f"{dtype} {list(shape)}" for dtype, shape in kinds) or "nothing"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
