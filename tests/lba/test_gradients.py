"""Fine-grained gradients: reference, kernels and convolutions against fractions. Sums are of small integers: exact."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recoup import lba
from recoup.errors import RecoupError
from recoup.formats import Float
from recoup.lba import LBA, cpu, cpu_gradient, driver, reference
from recoup.lba.ops import convolution
from recoup.network.convolution import Geometry
from tests.lba import exact
from tests.lba.strategies import as_floats, fits, others, truncating
from tests.lba.test_cpu import TARGETS, two

NARROW = LBA(Float.lba(3, 6, bias=4, rounding="stochastic"), Float.lba(3, 3, bias=3, rounding="stochastic"), 7)
FINE = ("recursive_of", "immediate_of", "immediate_diff", "recursive_diff")


def whole(generator, *shape, most=6):
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def backward(a, b, grad, config):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    return torch.autograd.grad(lba.matmul(a, b, config, seed=3), (a, b), grad)


@settings(max_examples=30)
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
    for mine in (reference.gradients(a, b, g, config), *at_all(a, b, g, config, two(data))):
        assert all(torch.equal(x.float(), y) for x, y in zip(mine, expected, strict=True))


def at_all(a, b, g, config, levels=TARGETS):
    for level in levels:
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


RANDOM = Float.lba(4, 2, bias=6, rounding="stochastic")


def test_a_stochastic_backward_unit_draws_seeds_of_its_own():
    """With a symmetric and b = grad = a, all three products are a a: none shares its random bits with another."""
    a = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    a = a + a.t()
    unit = LBA(RANDOM, RANDOM)
    config = unit.replace(backward=unit)

    def products(seed):
        x, w = a.clone().requires_grad_(), a.clone().requires_grad_()
        y = lba.matmul(x, w, config, seed=seed)
        y.backward(a)
        return y.detach(), x.grad, w.grad

    first, again, other = products(1), products(1), products(2)
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(first, other, strict=True))
    assert not any(torch.equal(first[i], first[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    torch.manual_seed(0)
    x = a.clone().requires_grad_()
    drawn = [torch.autograd.grad(lba.matmul(x, a, LBA(backward=unit)).sum(), x)[0] for _ in range(2)]
    assert not torch.equal(*drawn)


def test_a_stochastic_backward_unit_of_a_convolution():
    x, w = torch.randn(2, 4, 5, 5).requires_grad_(), torch.randn(6, 4, 3, 3).requires_grad_()
    config = LBA(backward=LBA(RANDOM, RANDOM))
    grads = []
    for seed in (1, 1, 2):
        y = convolution(x, w, config.code, [1, 1], [1, 1], [1, 1], 1, seed, "c")
        grads.append(torch.autograd.grad(y, (x, w), torch.ones_like(y)))
    assert all(torch.equal(p, q) for p, q in zip(grads[0], grads[1], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(grads[0], grads[2], strict=True))


@pytest.mark.parametrize("gradient", FINE)
def test_what_is_not_finite_reaches_the_gradients(gradient):
    """Everything that feeds a NaN output has a NaN gradient; the rest has its own."""
    config = LBA.biased(3, 3, bias=2, gradient=gradient, nonfinite="propagate")
    generator = torch.Generator().manual_seed(2)
    a, b, g = whole(generator, 2, 4, 9) / 4, whole(generator, 2, 9, 5), whole(generator, 2, 4, 5)
    plain = backward(a, b, g, config)
    a[0, 1, 3], b[1, 2, 4] = torch.inf, torch.nan
    found = backward(a, b, g, config)
    lost = [torch.zeros_like(x, dtype=torch.bool) for x in found]
    lost[0][0, 1], lost[1][0] = True, True  # row 1 of the first matrix's outputs
    lost[0][1], lost[1][1, :, 4] = True, True  # column 4 of the second's
    for got, bad, clean in zip(found, lost, plain, strict=True):
        assert torch.equal(got.isnan(), bad)
        assert torch.equal(got[~bad], clean[~bad])


@pytest.mark.parametrize("geometry", [Geometry(*g) for g in GEOMETRIES], ids=repr)
def test_what_is_not_finite_reaches_a_convolutions_gradients(geometry):
    config = LBA.biased(3, 3, bias=2, gradient="recursive_of", nonfinite="propagate")
    options = [list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups]
    generator = torch.Generator().manual_seed(2)
    x, w = whole(generator, 3, 4, 9, 8, most=3), whole(generator, 8, 4 // geometry.groups, *geometry.kernel, most=3) / 4

    def run(x, w):
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = convolution(x, w, config.code, *options, 0, "conv")
        return y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))

    _, *plain = run(x, w)
    for bad_x, bad_w in (([(1, 0, 2, 2)], []), ([], [(5, 0, 0, 0)]), ([(0, 3, 4, 4)], [(0, 0, 0, 0)])):
        one, other = x.clone(), w.clone()
        for place in bad_x:
            one[place] = torch.nan
        for place in bad_w:
            other[place] = -torch.inf
        y, *found = run(one, other)
        # The model: an operand feeds the outputs that autograd gives it a gradient from, all weights being one.
        inputs, filters = torch.ones_like(x).requires_grad_(), torch.ones_like(w).requires_grad_()
        reached = torch.autograd.grad(
            F.conv2d(inputs, filters, None, *options), (inputs, filters), y.isnan().float(), retain_graph=True
        )
        for got, count, clean in zip(found, reached, plain, strict=True):
            assert torch.equal(got.isnan(), count > 0)
            assert torch.equal(got[count == 0], clean[count == 0])


def test_twice_differentiable_where_the_gradient_is_the_products():
    a, b, x, w = torch.randn(3, 5), torch.randn(5, 4), torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)

    def second(run, *operands):
        operands = [v.clone().requires_grad_() for v in operands]
        first = torch.autograd.grad(run(*operands).sum(), operands, create_graph=True)
        return torch.autograd.grad(sum((f**2).sum() for f in first), operands)

    def emulated(x, w):
        return convolution(x, w, LBA().code, [1, 1], [1, 1], [1, 1], 1, 0, "c")

    for mine, plain, operands in (
        (lambda a, b: lba.matmul(a, b, LBA()), torch.matmul, (a, b)),
        (emulated, lambda x, w: F.conv2d(x, w, None, 1, 1), (x, w)),
    ):
        for got, expected in zip(second(mine, *operands), second(plain, *operands), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("config", [LBA(gradient="recursive_of"), LBA(backward=LBA())], ids=repr)
def test_other_gradients_are_not_differentiable(config):
    a = torch.randn(3, 5, requires_grad=True)
    (first,) = torch.autograd.grad(lba.matmul(a, torch.randn(5, 4), config).sum(), a, create_graph=True)
    with pytest.raises(RecoupError, match=r"lba.matmul: .* cannot be differentiated again"):
        first.sum().backward()
    x, w = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    y = convolution(x, w, config.code, [1, 1], [1, 1], [1, 1], 1, 0, "conv")
    first = torch.autograd.grad(y.sum(), (x, w), create_graph=True)
    with pytest.raises(RecoupError, match=r"conv: .* cannot be differentiated again"):
        first[1].sum().backward()


def test_partial_sums_are_few_where_they_are_large(monkeypatch):
    config = LBA.biased(4, 3, gradient="recursive_of")
    generator = torch.Generator().manual_seed(3)
    a, b, g = whole(generator, 9, 30) / 8, whole(generator, 30, 300), whole(generator, 9, 300, most=3)
    assert cpu_gradient.groups(1, 9, 30, 10) == cpu_gradient.GROUPS
    assert cpu_gradient.groups(1, 8192, 8192, 1000) == 2
    assert cpu_gradient.groups(1, 8192, 8192, 1) == 1
    expected = backward(a, b, g, config)
    monkeypatch.setattr(cpu_gradient, "PARTIAL_BYTES", 1)
    assert all(torch.equal(p, q) for p, q in zip(backward(a, b, g, config), expected, strict=True))
