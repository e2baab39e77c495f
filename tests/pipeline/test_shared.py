"""Packets through shared memory: they arrive as they were sent, in order, and who is gone or silent is told."""

import os
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recoup.errors import RecoupError
from recoup.pipeline import shared
from recoup.pipeline.transport import DistributedTransport

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems send over torch.distributed")


def blame(what, error):
    return RecoupError(f"could not {what}: {error}")


@contextmanager
def linked(timeout=10.0):
    with ExitStack() as stack:
        listener = shared.Listener()
        stack.callback(listener.close)
        line = shared.connect(listener.name, timeout)
        (other,) = listener.accept(1, timeout)
        ends = shared.Sender(line, 0, blame), shared.Receiver(other, timeout, blame)
        for end in ends:
            stack.callback(end.close)
        yield ends


def packet(k):
    return torch.full((3, 5), float(k)), torch.tensor([k, -k]), torch.tensor(k % 2 == 0)


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True)
    )


def test_packets_arrive_in_order_and_stay_what_they_were():
    with linked() as (sender, receiver):
        found = []
        for k in range(0, 30, 3):
            for i in range(3):
                sender.send(packet(k + i))
            found += [receiver.receive() for _ in range(3)]
        assert all(equal(one, packet(k)) for k, one in enumerate(found))
        sender.settle()


def test_a_sender_waits_where_all_slots_are_under_way():
    with linked() as (sender, receiver):
        sent = []

        def send():
            for k in range(3 * shared.SLOTS):
                sender.send(packet(k))
                sent.append(k)
            sender.settle()

        thread = threading.Thread(target=send)
        thread.start()
        time.sleep(0.2)
        assert len(sent) == shared.SLOTS
        assert all(equal(receiver.receive(), packet(k)) for k in range(3 * shared.SLOTS))
        thread.join(10)
        assert not thread.is_alive()
        assert len(sent) == 3 * shared.SLOTS


def test_a_receiver_waits_for_the_next():
    with linked() as (sender, receiver):
        sender.send(packet(1))
        assert equal(receiver.receive(), packet(1))
        thread = threading.Timer(0.2, sender.send, [packet(2)])
        begun = time.monotonic()
        thread.start()
        assert equal(receiver.receive(), packet(2))
        assert time.monotonic() - begun >= 0.2
        thread.join()


def test_an_empty_packet_and_one_that_needs_a_gradient():
    with linked() as (sender, receiver):
        sender.send(())
        assert receiver.receive() == ()
    with linked() as (sender, receiver):
        sender.send((torch.ones(2, requires_grad=True).t(),))
        (found,) = receiver.receive()
        assert not found.requires_grad
        assert found.data_ptr() % 64 == 0


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("silent", [False, True])
def test_who_is_gone_is_told_at_once_and_who_is_silent_in_time(silent, begun):
    def fill(sender):
        for k in range(shared.SLOTS + 1):
            sender.send(packet(k))

    began = time.monotonic()
    for which, told in ((0, "could not receive from"), (1, "could not send to")):
        with linked(timeout=0.3 if silent else 60) as ends:
            if begun:
                ends[0].send(packet(0))
                ends[1].receive()
            if not silent:
                ends[which].close()
            with pytest.raises(RecoupError, match=told):
                fill(ends[0]) if which else ends[1].receive()
    assert time.monotonic() - began < 30


def opened():
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}


@contextmanager
def descriptors(free):
    """As many as that are left to the process."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(opened()) + 8, before[1]))
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for descriptor in held[:free]:
            os.close(descriptor)
        held = held[free:]
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("free", range(3))
@pytest.mark.parametrize("sends", [True, False])
def test_where_no_descriptor_is_left_it_is_said_and_none_is_lost(monkeypatch, sends, free):
    rank: Any = SimpleNamespace(rank=0, _timeout=timedelta(seconds=9))
    monkeypatch.setitem(globals(), "blame", lambda what, error: DistributedTransport.blamed(rank, 1, what, error))
    before = opened()
    with linked() as (sender, receiver):
        if not sends:
            sender.send(packet(0))
        with descriptors(free), pytest.raises(RecoupError, match=r"could not .* rank 1: no file descriptor is left"):
            sender.send(packet(0)) if sends else receiver.receive()
        del sender, receiver
    assert opened() == before


def test_packets_unlike_those_before_are_refused():
    with linked() as (sender, _):
        sender.send(packet(0))
        with pytest.raises(RecoupError, match="rank 0 would send"):
            sender.send(packet(0)[:2])


def test_nobody_comes():
    listener = shared.Listener()
    try:
        with pytest.raises(OSError, match="timed out"):
            listener.accept(1, 0.1)
    finally:
        listener.close()
    with pytest.raises(OSError, match="refused"):
        shared.connect(listener.name, 0.1)


def test_a_machine_is_named_alike_by_its_processes():
    assert shared.machine() == shared.machine()
    assert len(shared.machine() or "") > 36
