"""Packets between two processes of one machine: through memory that both have, with a byte over a socket for each.

TCP takes an interrupt, three copies and a thread on either side, also to the same machine; where cores are as many as
processes all of that is taken from the stages. Here the sender copies a packet into a free slot and sends the slot's
number, the receiver copies it out and sends the number back. Neither leaves anything behind when it is killed: the
memory has no name, the socket's is no file's, and its end is seen at once.

Whoever waits is woken by an event, not by the socket: Linux takes that a process which writes to a socket is about to
sleep, and lets its neighbour run on the same core, where both then stay and share it.
"""

import errno
import mmap
import os
import secrets
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from recoup.errors import RecoupError
from recoup.pipeline.packets import HEADER, Kinds, Packet, announced, header, kinds_of, length, members, refuse_others

SLOTS = 8  # packets that may be under way in a direction; a pipeline that runs has up to three, one that fills more
NUMBER = 8  # bytes of a number of the header

Blame = Callable[[str, Exception], RecoupError]


def machine() -> str | None:
    """What processes have in common that can reach each other so: the running kernel and its network; None: cannot."""
    if sys.platform != "linux":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    return f"{boot} {Path('/proc/self/ns/net').readlink()}"


class Listener:
    """Where the rank before finds this one.

    Attributes:
        name: to be told to it.
    """

    def __init__(self) -> None:
        self.name = f"recoup-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen()

    def accept(self, count: int, timeout: float) -> list[socket.socket]:
        """So many connections, in the order in which they were made; those of other users do not count.

        Raises:
            OSError: they are not made in time.
        """
        found: list[socket.socket] = []
        end = time.monotonic() + timeout
        while len(found) < count:
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            try:
                line, _ = self._socket.accept()
            except OSError:
                for line in found:
                    line.close()
                raise
            _, user, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if user == os.getuid():
                found.append(_patient(line, timeout))
            else:
                line.close()
        return found

    def close(self) -> None:
        """Nobody else is expected."""
        self._socket.close()


def connect(name: str, timeout: float) -> socket.socket:
    """A connection to a `Listener`."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.connect(f"\0{name}")
    except OSError:
        line.close()
        raise
    return _patient(line, timeout)


def _patient(line: socket.socket, timeout: float) -> socket.socket:
    # By the kernel's own timeout: Python's takes a second system call for every byte.
    line.settimeout(None)
    limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        line.setsockopt(socket.SOL_SOCKET, option, limit)
    return line


class Sender:
    """One direction out.

    Args:
        line: to the receiver; it is closed with the sender.
        rank: this one, for errors.
        blame: the error of what it was doing, and of why it could not.
    """

    def __init__(self, line: socket.socket, rank: int, blame: Blame) -> None:
        self._line, self._rank, self._blame = line, rank, blame
        self._event = -1
        self._kinds: Kinds | None = None
        self._slots: list[Packet] = []
        self._free: list[int] = []

    def send(self, packet: Packet) -> None:
        """Copy a packet and tell; waits only where all slots are under way."""
        kinds = kinds_of(packet)
        try:
            if self._kinds is None:
                self._begin(kinds)
                self._kinds = kinds
            refuse_others(kinds, self._kinds, self._rank)
            self._returned(0 if self._free else 1)
            slot = self._free.pop()  # the last one that came back: it is in the caches
            for member, x in zip(self._slots[slot], packet, strict=True):
                member.copy_(x.detach())
            self._line.sendall(bytes([slot]))
            os.eventfd_write(self._event, 1)
        except OSError as error:
            raise self._blame("send to", error) from None

    def _begin(self, kinds: Kinds) -> None:
        told, size = header(kinds), length(kinds)
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        memory = os.memfd_create("recoup-packets", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, SLOTS * size)
            self._slots = _opened(memory, kinds)
            socket.send_fds(self._line, [told.numpy().tobytes()], [memory, self._event])
        finally:
            os.close(memory)
        self._free = list(range(SLOTS))

    def _returned(self, least: int) -> None:
        """Take back slots that were read, waiting for so many."""
        while True:
            try:
                found = self._line.recv(SLOTS, 0 if least > 0 else socket.MSG_DONTWAIT)
            except BlockingIOError:
                if least > 0:
                    raise
                return
            _refuse_end(found)
            self._free += found
            least -= len(found)
            if least <= 0:
                return

    def settle(self) -> None:
        """Wait until everything sent was read."""
        if self._kinds is None or len(self._free) == SLOTS:
            return
        try:
            self._returned(SLOTS - len(self._free))
        except OSError as error:
            raise self._blame("send to", error) from None

    def close(self) -> None:
        """End the connection."""
        self._line.close()
        if self._event >= 0:
            os.close(self._event)
            self._event = -1


class Receiver:
    """One direction in; arguments as of `Sender`, and how many seconds it waits."""

    def __init__(self, line: socket.socket, timeout: float, blame: Blame) -> None:
        self._line, self._timeout, self._blame = line, timeout, blame
        self._slots: list[Packet] = []
        self._event = -1
        self._poll = select.poll()

    def expect(self, count: int) -> None:
        """How many packets are still to come: nothing depends on it here."""

    def receive(self) -> Packet:
        """The next packet."""
        try:
            if not self._slots:
                self._begin()
            slot = self._told()
            packet = tuple(member.clone() for member in self._slots[slot])
            self._line.sendall(bytes([slot]))
        except OSError as error:
            raise self._blame("receive from", error) from None
        return packet

    def _begin(self) -> None:
        told, given, *_ = socket.recv_fds(self._line, HEADER * NUMBER, 2)
        _refuse_end(told)
        if len(given) < 2:  # the system leaves out those for which there is no room
            for descriptor in given:
                os.close(descriptor)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        memory, self._event = given
        try:
            self._slots = _opened(memory, announced(torch.frombuffer(bytearray(told), dtype=torch.int64)))
        finally:
            os.close(memory)
        self._poll.register(self._event, select.POLLIN)
        self._poll.register(self._line, 0)  # for its end

    def _told(self) -> int:
        """The number of the next slot."""
        while True:
            try:
                found = self._line.recv(1, socket.MSG_DONTWAIT)
                _refuse_end(found)
                return found[0]
            except BlockingIOError:
                self._wait()

    def _wait(self) -> None:
        """Until the sender has written or is gone."""
        ready = self._poll.poll(self._timeout * 1000)
        if not ready:
            raise TimeoutError("no packet in time")
        if (self._event, select.POLLIN) in ready:
            os.eventfd_read(self._event)

    def close(self) -> None:
        """End the connection."""
        self._line.close()
        if self._event >= 0:
            os.close(self._event)
            self._event = -1


def _refuse_end(found: bytes) -> None:
    if not found:
        raise ConnectionError("the connection has ended")


def _opened(memory: int, kinds: Kinds) -> list[Packet]:
    """The slots of a memory, each as the members of a packet; the memory lives as long as one of them."""
    size = length(kinds)
    whole: Tensor = torch.frombuffer(mmap.mmap(memory, SLOTS * size), dtype=torch.uint8)
    return [members(whole[slot * size : (slot + 1) * size], kinds) for slot in range(SLOTS)]
