"""Fine-grained gradients: reference, kernels and convolutions against fractions. Sums are of small integers: exact."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recoup import lba
from recoup.formats import Float
from recoup.lba import LBA, cpu, driver, reference
from recoup.lba.geometry import Geometry
from recoup.lba.ops import convolution
from tests.lba import exact
from tests.lba.strategies import as_floats, fits, others, truncating
from tests.lba.test_cpu import TARGETS

NARROW = LBA(Float.lba(3, 6, bias=4, rounding="stochastic"), Float.lba(3, 3, bias=3, rounding="stochastic"), 7)
FINE = ("recursive_of", "immediate_of", "immediate_diff", "recursive_diff")


def whole(generator, *shape, most=6):
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def backward(a, b, grad, config):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    lba.matmul(a, b, config, seed=3).backward(grad)
    return a.grad, b.grad


@settings(max_examples=60)
@given(st.data(), st.integers(0, 2**31), st.sampled_from((1.0, 0.25, 0.125)))
def test_equal_to_the_fractions(data, seed, unit):
    config = data.draw(truncating() | others()).replace(gradient=data.draw(st.sampled_from(FINE)))
    generator = torch.Generator().manual_seed(seed)
    M, K, N = (data.draw(st.integers(1, n)) for n in (4, 20, 4))
    a, b, g = whole(generator, M, K) * unit, whole(generator, K, N), whole(generator, M, N, most=3)
    assume(fits(a, b, config))
    expected = [
        torch.tensor([[float(v) for v in row] for row in rows])
        for rows in exact.gradients(as_floats(a), as_floats(b), as_floats(g), config)
    ]
    for mine in (reference.gradients(a, b, g, config), *at_all(a, b, g, config)):
        assert all(torch.equal(x.float(), y) for x, y in zip(mine, expected, strict=True))


def at_all(a, b, g, config):
    for level in TARGETS:
        with cpu.target(level):
            yield backward(a, b, g, config)


@pytest.mark.parametrize("gradient", FINE)
@pytest.mark.parametrize("base", [LBA.biased(4, 3), LBA.biased(2, 3, bias=4, chunk=5), NARROW], ids=repr)
def test_larger_shapes(base, gradient):
    config = base.replace(gradient=gradient)
    generator = torch.Generator().manual_seed(1)
    a, b, g = whole(generator, 2, 19, 70) / 8, whole(generator, 2, 70, 75), whole(generator, 2, 19, 75, most=3)
    expected = [reference.gradients(a[i], b[i], g[i], config, 3, i * 19 * 75) for i in range(2)]
    killed = reference.indicators(a[0], b[0], config, 3)
    assert 0 < float(killed.float().mean()) < 1  # the indicators say something
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for grads in at_all(a, b, g, config):
                for i in range(2):
                    assert all(torch.equal(x[i], y.float()) for x, y in zip(grads, expected[i], strict=True))
        finally:
            torch.set_num_threads(before)


GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((3, 2), (2, 1), (1, 0), (1, 2), 2),
    ((1, 1), (2, 2), (0, 0), (1, 1), 4),
    ((2, 3), (1, 3), (2, 1), (2, 1), 1),
]


@pytest.mark.parametrize("geometry", [Geometry(*g) for g in GEOMETRIES], ids=repr)
@pytest.mark.parametrize("gradient", FINE)
def test_convolutions(geometry, gradient):
    config = LBA.biased(3, 3, bias=2, gradient=gradient)
    generator = torch.Generator().manual_seed(2)
    x, w = whole(generator, 3, 4, 9, 8, most=3), whole(generator, 8, 4 // geometry.groups, *geometry.kernel, most=3) / 4
    x.requires_grad_()
    w.requires_grad_()
    options = [list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups]
    y = convolution(x, w, config.code, *options, 0, "conv")
    grad = whole(generator, *y.shape, most=2)
    y.backward(grad)
    G, columns = geometry.groups, geometry.columns(x.detach())
    rows, g = w.detach().view(G, 8 // G, -1), grad.transpose(0, 1).reshape(G, 8 // G, -1)
    pairs = [reference.gradients(rows[i], columns[i], g[i], config) for i in range(G)]
    assert torch.equal(w.grad, torch.stack([p[0] for p in pairs]).float().view(w.shape))
    assert torch.equal(x.grad, geometry.image(torch.stack([p[1] for p in pairs]).float(), x.shape))


def test_a_convolution_in_blocks(monkeypatch):
    config, geometry = LBA.biased(4, 3, gradient="recursive_of"), Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    generator = torch.Generator().manual_seed(2)
    x, w, g = whole(generator, 5, 2, 6, 6), whole(generator, 3, 2, 3, 3) / 4, whole(generator, 5, 3, 6, 6, most=2)
    together = driver.convolution_gradients(cpu.Cpu(), g, x, w, geometry, config)
    y = driver.convolution(cpu.Cpu(), x, w, geometry, config)
    monkeypatch.setattr(driver, "GRADIENT_BYTES", 1)
    monkeypatch.setattr(driver, "IMAGE_BYTES", 1)
    assert all(
        torch.equal(*pair)
        for pair in zip(together, driver.convolution_gradients(cpu.Cpu(), g, x, w, geometry, config), strict=True)
    )
    assert torch.equal(y, driver.convolution(cpu.Cpu(), x, w, geometry, config))


def test_identity_is_the_float_gradient():
    a, b, g = torch.randn(5, 30), torch.randn(30, 6), torch.randn(5, 6)
    grad_a, grad_b = backward(a, b, g, LBA())
    assert torch.equal(grad_a, g @ b.t())
    assert torch.equal(grad_b, a.t() @ g)


@pytest.mark.parametrize("geometry", [Geometry(*g) for g in GEOMETRIES], ids=repr)
def test_backward_products_on_a_unit(geometry):
    """On whole numbers a wide unit is exact, so autograd's own gradient is the model; a narrow one must differ."""
    wide = Float.lba(6, 20, bias=20)
    generator = torch.Generator().manual_seed(2)
    x, w = whole(generator, 2, 4, 9, 8), whole(generator, 8, 4 // geometry.groups, *geometry.kernel)
    options = [list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups]
    x.requires_grad_()
    w.requires_grad_()
    y = F.conv2d(x, w, None, *options)
    grad = whole(generator, *y.shape, most=2)
    expected = torch.autograd.grad(y, (x, w), grad)
    for unit, equal in ((LBA(wide, wide), True), (LBA.biased(2, 3), False)):
        z = convolution(x, w, LBA(wide, wide, backward=unit).code, *options, 0, "conv")
        got = torch.autograd.grad(z, (x, w), grad)
        assert all(torch.equal(p, q) == equal for p, q in zip(got, expected, strict=True))
    a, b, g = whole(generator, 5, 30), whole(generator, 30, 6), whole(generator, 5, 6)
    unit = LBA.biased(3, 4)
    grad_a, grad_b = backward(a, b, g, LBA(backward=unit))
    assert torch.equal(grad_a, reference.matmul(g, b.t(), unit))
    assert torch.equal(grad_b, reference.matmul(a.t(), g, unit))
