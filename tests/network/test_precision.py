"""A precision that torch was given for float32 reaches no product whose bits recoup answers for, and is recorded."""

import os
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recoup as rc
from recoup.models.attention import AttentionProducts
from recoup.nbsmt import cpu
from recoup.network.checks import _whole, float32_products, reduced_float32
from recoup.network.emulated import running
from recoup.tasks.bench import capability
from tests import forked

KNOBS = [("mkldnn", "conv"), ("mkldnn", "matmul"), ("mkldnn", "all"), ("generic", "all")]
BOTH = {"matmul": "bf16", "conv": "bf16"}


def knob(name, value):
    torch._C._set_fp32_precision_setter(*name, value)


def held():
    return {name: torch._C._get_fp32_precision_getter(*name) for name in KNOBS}


WAYS = {
    "medium": (lambda: torch.set_float32_matmul_precision("medium"), {"matmul": "bf16"}),
    "high": (lambda: torch.set_float32_matmul_precision("high"), {"matmul": "tf32"}),
    "each": (lambda: [knob(("mkldnn", name), "bf16") for name in ("matmul", "conv")], BOTH),
    "backend": (lambda: knob(("mkldnn", "all"), "bf16"), BOTH),
    "everywhere": (lambda: knob(("generic", "all"), "bf16"), BOTH),
}


@pytest.fixture(params=WAYS)
def given(request):
    """A way to have float32 computed in fewer bits, and what it concerns."""
    torch.set_float32_matmul_precision("highest")
    for name in KNOBS:
        knob(name, "none")
    before = held()
    way, concerned = WAYS[request.param]
    way()
    yield concerned
    for name in KNOBS:
        knob(name, "none")
    torch.set_float32_matmul_precision("highest")
    knob(("mkldnn", "matmul"), "none")
    assert held() == before


@pytest.fixture
def seen(monkeypatch):
    """What could reduce the products that ran, one after the other."""
    found = []

    def watched(plain):
        def product(*args, **kwargs):
            found.append(reduced_float32())
            return plain(*args, **kwargs)

        return product

    for name in ("linear", "conv1d", "conv2d"):
        monkeypatch.setattr(F, name, watched(getattr(F, name)))
    monkeypatch.setattr(torch.Tensor, "__matmul__", watched(torch.Tensor.__matmul__))
    return found


def in_baseline(layer, config, *args):
    model = rc.emulate_(nn.Sequential(layer), config)
    with running(model, "baseline"):
        model[0](*args)


def attended(config):
    in_baseline(AttentionProducts(), config, *torch.randn(3, 1, 4, 16))


def shared():
    a = torch.randint(0, 256, (4, 8), dtype=torch.uint8)
    rc.nbsmt.matmul(a, torch.randint(-127, 128, (8, 3), dtype=torch.int8), rc.NBSMT(threads=2))


def convolved():
    x, w = torch.randint(0, 256, (1, 4, 5, 5), dtype=torch.uint8), torch.randint(-9, 9, (2, 4, 3, 3), dtype=torch.int8)
    cpu.exact_convolution(x, w, (1, 1), (0, 0), (1, 1), 1, 1 << 20)


def attended_on_nbsmt():
    with float32_products(torch.ones(1)):  # the float network is its owner's
        model = rc.calibrate_(nn.Sequential(Three()), [torch.randn(2, 4, 16)], {"re:.*": True})
    rc.emulate_(model, rc.NBSMT(threads=2))(torch.randn(2, 4, 16))


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.products = AttentionProducts()

    def forward(self, x):
        return self.products(x, x, x)


CORE, MICRO = rc.TensorCore.hopper_fp8(), rc.TensorCore.blackwell_mxfp4()
PATHS = {
    "nbsmt.matmul": shared,
    "nbsmt convolution": convolved,
    "nbsmt attention": attended_on_nbsmt,
    "lba linear": lambda: in_baseline(nn.Linear(8, 4), rc.LBA(), torch.randn(2, 8)),
    "lba convolution": lambda: in_baseline(nn.Conv2d(3, 4, 3), rc.LBA(), torch.randn(2, 3, 5, 5)),
    "lba convolution 1d": lambda: in_baseline(nn.Conv1d(3, 4, 3), rc.LBA(), torch.randn(2, 3, 5)),
    "core linear": lambda: in_baseline(nn.Linear(8, 4), CORE, torch.randn(2, 8)),
    "core convolution": lambda: in_baseline(nn.Conv2d(3, 4, 3), CORE, torch.randn(2, 3, 5, 5)),
    "core attention": lambda: attended(CORE),
    "core in blocks": lambda: in_baseline(nn.Linear(64, 4), MICRO, torch.randn(2, 64)),
}


@pytest.mark.parametrize("path", PATHS)
def test_products_whose_bits_count_are_of_whole_float32(given, seen, path):
    assert reduced_float32() == given
    knobs = held()
    PATHS[path]()
    assert seen
    assert not any(seen)
    assert held() == knobs


def test_a_setting_that_follows_a_wider_one_goes_on_doing_so(given):
    x, wide = torch.ones(1), held()
    with float32_products(x):
        assert reduced_float32() == {}
        with torch.autocast("cpu"), float32_products(x):
            assert not torch.is_autocast_enabled("cpu")
    assert reduced_float32() == given
    follows = [name for name in KNOBS[2:] if wide[name] == "bf16"]
    for name in follows:
        knob(name, "none")
    assert reduced_float32() == ({} if follows else given)


def test_measurements_are_filed_under_it(given):
    told = capability()
    for name, value in given.items():
        assert f", {name} in {value}" in told
        knob(("mkldnn", name), "ieee")
    assert " in " not in capability()


def test_threads_put_the_precision_back_once_all_are_done(given):
    """It is torch's for all threads: the first to leave must not take it from the others."""
    inside, leave = threading.Barrier(3), [threading.Event(), threading.Event()]

    def use(number):
        with float32_products(torch.ones(1)):
            inside.wait(30)
            leave[number].wait(30)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(30)
    found = [reduced_float32()]
    for event, thread in zip(leave, threads, strict=True):
        event.set()
        thread.join(30)
        found.append(reduced_float32())
    assert found == [{}, {}, given]


def test_who_asks_while_another_leaves_has_whole_float32_for_as_long_as_it_runs(given, monkeypatch):
    """Asked outside the lock, the answer is no, and the other puts fewer bits back before the product."""
    plain, inside, asked, gone = torch._C._get_fp32_precision_getter, *(threading.Event() for _ in range(3))
    found = []

    def getter(backend, name):
        value = plain(backend, name)
        if threading.current_thread().name == "asks" and name == "conv" and not asked.is_set():
            asked.set()
            gone.wait(1)  # in vain, if who leaves has to wait for the answer
        return value

    def leave():
        with float32_products(torch.ones(1)):
            inside.set()
            asked.wait(1)
        gone.set()

    def ask():
        inside.wait(30)
        with float32_products(torch.ones(1)):
            leaves.join(30)
            found.append(reduced_float32())

    monkeypatch.setattr(torch._C, "_get_fp32_precision_getter", getter)
    leaves, asks = threading.Thread(target=leave), threading.Thread(target=ask, name="asks")
    for thread in (leaves, asks):
        thread.start()
    for thread in (leaves, asks):
        thread.join(30)
    assert found == [{}]
    assert reduced_float32() == given


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_in_the_middle_of_anothers_product_neither_waits_for_it_nor_keeps_its_precision(given):
    """As a DataLoader's workers are made while a thread multiplies."""
    inside, done = threading.Event(), threading.Event()

    def multiply():
        with float32_products(torch.ones(1)), _whole.lock:
            inside.set()
            done.wait(30)

    thread = threading.Thread(target=multiply)
    thread.start()
    inside.wait(30)

    def fell_and_is_whole_again():
        fell = reduced_float32() == given
        with float32_products(torch.ones(1)):
            return fell and reduced_float32() == {}

    child = forked.begun(fell_and_is_whole_again)
    done.set()
    thread.join(30)
    assert forked.held(child)
    assert reduced_float32() == given
