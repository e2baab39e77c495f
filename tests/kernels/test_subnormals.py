"""`torch.set_flush_denormal(True)` changes no bit of any wing, on one thread or several."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.kernels import subnormals
from recoup.kernels.threads import over_rows

SMALL = 2.0**-130
WIDE = rc.LBA(product=rc.Float(23, -149, 100), accumulator=rc.Float(23, -149, 100), chunk=None)


@pytest.fixture
def flushed():
    """Switches flushing on and, after the test, off."""
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


def numbers(*shape: int) -> torch.Tensor:
    """Some of them subnormal, some just above, some not negative by a hair."""
    random = torch.Generator().manual_seed(0)
    exponents = torch.randint(-148, -110, shape, generator=random)
    return torch.ldexp(torch.randn(shape, generator=random).double(), exponents).float()


X, W, GRAD = numbers(64, 12), numbers(12, 3) * 2.0**100, numbers(64, 12)
ACTIVATIONS = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))


def formats() -> list[torch.Tensor]:
    forms = [rc.Float.parse("bfloat16"), rc.Float.ieee(8, 10), rc.Float(3, -140, 3, False, "zero"), rc.Int(8)]
    return [rc.quantize(X, form) for form in (*forms, rc.BlockFloat(exponent=8, significand=5, block=4, dim=1))]


def lba() -> list[torch.Tensor]:
    found = []
    for config in (WIDE, rc.LBA(product=None, accumulator=rc.Float(7, -149, 100, False, "zero")), rc.LBA.m7e4()):
        for w in (torch.ones(12, 3), W):
            a, unit = X.clone().requires_grad_(), config.replace(gradient="recursive_diff")
            y = rc.lba.matmul(a, w, unit)
            y.backward(torch.ones(64, 3))
            found += [y, a.grad]
    return found


def nbsmt() -> list[torch.Tensor]:
    layer = rc.nbsmt.NBSMTLinear(12, 5, bias=False, config=rc.NBSMT(threads=2))
    layer.activation_scale = 2.0**-133
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, layer.weight.numel()).view_as(layer.weight))
    return [layer(X.abs())]


def lightnorm() -> list[torch.Tensor]:
    found = []
    for config in (rc.LightNorm(), rc.LightNorm.range(chunks=8), rc.LightNorm(forward=rc.Float(10, -126, 100))):
        layer = rc.LightNorm1d(12, config=config)
        layer.weight.data = GRAD[0].clone()
        x = ACTIVATIONS.clone().requires_grad_()
        y = layer(x)
        y.backward(GRAD)
        found += [y, x.grad, layer.weight.grad, layer.eval()(x)]
    return found


@pytest.mark.parametrize("wing", [formats, lba, nbsmt, pytest.param(lightnorm, marks=pytest.mark.slow)])
def test_no_bit_changes(flushed, wing):
    expected = [y.detach().view(torch.int32) for y in wing()]
    assert any((y & 0x7F800000 == 0).logical_and(y & 0x7FFFFF != 0).any() for y in expected), "nothing to flush"
    flushed(True)
    found = [y.detach().view(torch.int32) for y in wing()]
    flushed(False)
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours, wanted)


def test_negative_inputs_below_the_normal_numbers_are_still_refused(flushed):
    x = torch.tensor([[1.0, -1e-40, 0.0, 0.0]])
    flushed(True)
    layer = rc.nbsmt.NBSMTLinear(4, 2, config=rc.NBSMT())
    layer.activation_scale = 1.0
    with pytest.raises(rc.RecoupError, match="negative"):
        layer(x)


def test_errors_gradients_and_the_callers_state_pass_through(flushed):
    small = torch.full((2, 2), SMALL)
    flushed(True)
    with pytest.raises(rc.RecoupError, match="NaN or infinite"):
        rc.lba.matmul(torch.full((2, 2), float("nan")), torch.ones(2, 2), rc.LBA())
    with torch.inference_mode():
        assert rc.lba.matmul(small, torch.ones(2, 2), WIDE).view(torch.int32).ne(0).all()
    assert subnormals.flushes()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    rc.emulate_(model, rc.LBA())
    model(torch.rand(3, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_workers_never_flush(flushed):
    torch.set_num_threads(3)
    flushed(True)
    seen = []
    over_rows(lambda first, _: seen.append((first, subnormals.flushes())), 3, 1 << 20)
    assert dict(seen) == {0: True, 1: False, 2: False}


def sums() -> list[int]:
    """Of bits of results that are shared out over threads."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(1, 1 << 24, (1500, 300), generator=random, dtype=torch.int32).view(torch.float32)
    w = torch.randint(0, 3, (300, 200), generator=random).float()
    narrow = rc.LBA(product=None, accumulator=rc.Float(7, -149, 100, False, "zero"))
    found = [rc.lba.matmul(x, w, narrow), rc.quantize(x, rc.Float(3, -140, 3))]
    return [int(y.view(torch.int32).long().sum()) for y in found]


SCRIPT = """
import torch
torch.set_flush_denormal(True)
import recoup
torch.set_num_threads(2)
from tests.kernels.test_subnormals import sums
print(*sums())
"""


@pytest.mark.slow
def test_workers_that_torch_starts_while_it_flushes_change_nothing():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(number) for number in sums()]
