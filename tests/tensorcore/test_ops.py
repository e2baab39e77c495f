"""The operator: shapes, gradients, non-finite numbers, bad input."""

import math

import pytest
import torch
from torch.library import opcheck

import recoup as rc
from recoup.errors import RecoupError
from recoup.tensorcore import TensorCore, TensorCoreLinear, matmul, ops, reference
from recoup.tensorcore.quantizers import for_gradient
from tests.tensorcore.strategies import operands, same

HOPPER = TensorCore.hopper_fp8()


def test_batches_broadcast():
    a, b = operands(HOPPER, (6, 40, 5), "normal", 0)
    whole = matmul(a, b, HOPPER)
    assert same(matmul(a.view(2, 3, 40), b, HOPPER), whole.view(2, 3, 5))
    assert same(matmul(a.view(2, 1, 3, 40), torch.stack([b, -b]), HOPPER)[:, 1], -whole.view(2, 3, 5) + 0.0)
    assert matmul(a[:, :0], b[:0], HOPPER).eq(0).all()
    assert matmul(a[:0], b, HOPPER).shape == (0, 5)
    assert same(matmul(a, b, HOPPER, scale_a=2.0, scale_b=torch.full((1, 5), 0.5)), whole)


def test_opcheck_and_compile():
    a, b = operands(HOPPER, (3, 33, 4), "normal", 1)
    arguments = (a[None].requires_grad_(), b[None].requires_grad_(), HOPPER.code, "layer", "a b")
    opcheck(ops.product, arguments)
    compiled = torch.compile(lambda x, y: matmul(x, y, HOPPER), fullgraph=True, backend="aot_eager")
    assert same(compiled(a, b), matmul(a, b, HOPPER))


def test_gradients_are_those_of_the_product():
    a, b = (t.requires_grad_() for t in operands(HOPPER, (3, 33, 4), "normal", 2))
    matmul(a, b, HOPPER).square().sum().backward()
    y = matmul(a, b, HOPPER).detach()
    assert torch.equal(a.grad, 2 * y @ b.detach().mT)
    assert torch.equal(b.grad, a.detach().mT @ (2 * y))


def test_gradients_on_the_unit():
    unit = HOPPER.replace(backward="unit")
    a, b = (t.requires_grad_() for t in operands(unit, (3, 33, 4), "normal", 2))
    grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    matmul(a, b, unit).backward(grad)
    scale = grad.abs().max() / 57344
    codes = rc.quantize(grad / scale, rc.Float.parse("e5m2"))
    first = reference.matmul(codes, b.detach().mT.contiguous(), HOPPER.replace(operands=("e5m2", "e4m3fn")))
    second = reference.matmul(a.detach().mT.contiguous(), codes, HOPPER.replace(operands=("e4m3fn", "e5m2")))
    assert torch.equal(a.grad, first * scale)
    assert torch.equal(b.grad, second * scale)


@pytest.mark.parametrize(
    ("unit", "name"),
    [
        (TensorCore.hopper_fp8(output="float16", amax=8.0, backward="unit"), "e5m2"),
        (TensorCore.hopper_f16(amax=16.0, backward="unit"), "float16"),
        (TensorCore.hopper_f16(amax=60000.0, backward="unit"), "float16"),
        (TensorCore.hopper_bf16(backward="unit"), "bfloat16"),
    ],
)
def test_gradients_keep_to_the_units_format_and_amax(unit, name):
    grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    y, scale, found = for_gradient(grad, unit)
    assert found == name
    assert torch.equal(rc.quantize(y, rc.Float.parse(name)), y)
    assert y.abs().max() <= (unit.amax or y.abs().max())
    assert torch.allclose(y * scale, grad, rtol=0.2, atol=1e-6)
    layer = TensorCoreLinear(32, 8, config=unit)
    layer(torch.randn(5, 32)).square().mean().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_foreign_value_beside_nan_is_refused_on_any_number_of_threads(threads):
    torch.set_num_threads(threads)
    b = torch.ones(64, 8192)
    b[0, 10], b[0, -1] = 0.3, math.nan
    with pytest.raises(RecoupError, match=r"b holds 0\.30.*no value of e4m3fn"):
        matmul(torch.ones(8, 64), b, HOPPER.replace(nonfinite="propagate"))


@pytest.mark.parametrize(
    "unit", [TensorCore.ampere_bf16(nonfinite="propagate"), TensorCore.hopper_f16(nonfinite="propagate")]
)
def test_what_is_not_finite_goes_the_units_way(unit):
    generator = torch.Generator().manual_seed(5)
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    for seed in range(6):
        a, b = operands(unit, (4, 20, 4), "large" if seed % 2 else "zeros", seed)
        for x in (a, b):
            places = torch.rand(x.shape, generator=generator) < 0.04
            x[places] = special[torch.randint(4, (int(places.sum()),), generator=generator)]
        assert same(matmul(a, b, unit), reference.matmul(a, b, unit))


@pytest.mark.parametrize(
    ("a", "b", "unit", "told"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), HOPPER, r"a \[..., M, K\] and b \[..., K, N\] expected"),
        (torch.ones(2, 2, 3), torch.ones(3, 3, 3), HOPPER, "do not broadcast"),
        (torch.ones(2, 3).double(), torch.ones(3, 2), HOPPER, "a must be a dense float32 tensor; got torch.float64"),
        (torch.full((2, 3), 1.1), torch.ones(3, 2), HOPPER, "a holds 1.10.*, which is no value of e4m3fn"),
        (torch.ones(2, 3), torch.full((3, 2), 449.0), HOPPER, "b holds 449.0, which is no value of e4m3fn"),
        (torch.ones(2, 3), torch.full((3, 2), math.nan), HOPPER, "b has 6 elements that are NaN or infinite"),
        (torch.full((2, 3), math.inf), torch.ones(3, 2), HOPPER.replace(nonfinite="propagate"), "a has 6 elements"),
        (torch.ones(2, 3), torch.ones(3, 2), rc.LBA(), "config must be a TensorCore"),
        ([[1.0]], torch.ones(1, 2), HOPPER, "a and b must be tensors; got list"),
        (torch.ones(2, 3), torch.ones(3, 2, device="meta"), HOPPER, "a lies on cpu, b on meta"),
    ],
)  # fmt: skip
def test_bad_input(a, b, unit, told):
    with pytest.raises(RecoupError, match=told):
        matmul(a, b, unit)


def test_results_keep_no_tiles():
    for columns in (1, 3, 200):
        y = matmul(torch.ones(1, 64), torch.ones(64, columns), TensorCore.hopper_bf16())
        assert y.untyped_storage().nbytes() <= 2 * y.nbytes
