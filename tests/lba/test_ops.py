import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup import lba
from recoup.errors import RecoupError
from recoup.formats import Float, Int
from recoup.lba import LBA, reference
from recoup.lba.config import GRADIENTS
from recoup.lba.ops import convolution
from tests.lba import exact
from tests.lba.strategies import as_floats, float32


def pair(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("config", [*(LBA(gradient=g) for g in GRADIENTS), LBA(backward=LBA.biased(10, 5))], ids=repr)
def test_the_operators_pass_torchs_own_checks(config):
    a, b = pair((2, 3, 8), (2, 8, 4))
    grads = (a.clone().requires_grad_(), b.clone().requires_grad_())
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.recoup.lba_matmul, (*grads, config.code, 0, "x"), test_utils=checks)
    x, w = pair((2, 4, 5, 6), (6, 2, 3, 3))
    arguments = (x.requires_grad_(), w.requires_grad_(), config.code, [1, 2], [1, 0], [1, 1], 2, 0, "x")
    torch.library.opcheck(torch.ops.recoup.lba_convolution, arguments, test_utils=checks)


def test_compiles_whole():
    a, b = pair((3, 20), (20, 5))
    config = LBA()

    def run(a, b):
        return torch.relu(lba.matmul(a, b, config)) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b), run(a, b))


def test_autocast_is_undone():
    a, b = pair((4, 30), (30, 5))
    expected = lba.matmul(a, b, LBA())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lba.matmul(a, b, LBA()), expected)
        halves = a.bfloat16(), b.bfloat16()
        y = lba.matmul(*halves, LBA())
    assert y.dtype == torch.float32
    assert torch.equal(y, lba.matmul(*(x.float() for x in halves), LBA()))


def test_gradients_of_broadcast_operands():
    a, b = pair((2, 1, 3, 8), (4, 8, 5))
    grad = torch.randn(2, 4, 3, 5)
    operands = [x.clone().requires_grad_() for x in (a, b)]
    plain = [x.clone().requires_grad_() for x in (a, b)]
    lba.matmul(*operands, LBA()).backward(grad)
    (plain[0] @ plain[1]).backward(grad)
    for x, y in zip(operands, plain, strict=True):
        torch.testing.assert_close(x.grad, y.grad)  # batched sums in another order
    only = a.clone().requires_grad_()
    lba.matmul(only, b, LBA(gradient="recursive_of")).sum().backward()
    assert only.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_other_dtypes_are_refused(dtype):
    a, b = torch.ones(2, 3, dtype=dtype), torch.ones(3, 2)
    with pytest.raises(RecoupError, match=f"float32; got {dtype}"):
        lba.matmul(a, b, LBA())


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (((2, 3), (4, 2)), r"a \[..., M, K\]"),
        (((3,), (3, 2)), r"got \[3\]"),
        (((2, 2, 3), (3, 3, 2)), "do not broadcast"),
    ],
)
def test_shapes_that_do_not_fit(shapes, told):
    with pytest.raises(RecoupError, match=told):
        lba.matmul(*pair(*shapes), LBA())


def test_no_config():
    with pytest.raises(RecoupError, match="must be an LBA"):
        lba.matmul(*pair((2, 3), (3, 2)), "m7e4")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_or_propagates(value):
    a, b = pair((3, 5, 40), (3, 40, 6))
    clean = lba.matmul(a, b, LBA())
    for which in (0, 1):
        operands = [a.clone(), b.clone()]
        operands[which][1, 2, 3] = value
        with pytest.raises(RecoupError, match=rf"lba.matmul: operand {'ab'[which]} \[3, .* holds 1 NaN or infinite"):
            lba.matmul(*operands, LBA())
        y = lba.matmul(*operands, LBA(nonfinite="propagate"))
        bad = torch.zeros_like(clean, dtype=torch.bool)
        if which == 0:
            bad[1, 2] = True
        else:
            bad[1, :, 3] = True
        assert torch.equal(y.isnan(), bad)
        assert torch.equal(y[~bad], clean[~bad])


def test_not_finite_in_a_convolution():
    x, w = pair((2, 3, 6, 6), (4, 3, 3, 3))
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    x[1, 0, 0, 0] = float("nan")
    with pytest.raises(RecoupError, match=r"layer 'c': operand input"):
        convolution(x, w, LBA().code, *geometry, 0, "layer 'c'")
    y = convolution(x, w, LBA(nonfinite="propagate").code, *geometry, 0, "c")
    expected = F.conv2d(x, w, None, *geometry).isnan()
    assert torch.equal(y.isnan(), expected)
    x[1, 0, 0, 0], w[2, 1, 1, 1] = 0.0, float("inf")
    y = convolution(x, w, LBA(nonfinite="propagate").code, *geometry, 0, "c")
    assert y[:, 2].isnan().all()
    assert not y[:, [0, 1, 3]].isnan().any()


def test_products_must_fit_an_integer_that_saturates():
    config = LBA(None, Int(8), None)
    a, b = torch.tensor([[12.0, 1.0]]), torch.tensor([[10.0], [127.0]])
    assert lba.matmul(a, b, config).item() == 127
    with pytest.raises(RecoupError, match=r"products from .* to 132 do not fit the accumulator Int"):
        lba.matmul(a, b + 1, config)
    x, w = torch.full((1, 1, 3, 3), 12.0), torch.full((1, 1, 2, 2), 11.0)
    with pytest.raises(RecoupError, match=r"c: products .* do not fit"):
        convolution(x, w, config.code, [1, 1], [0, 0], [1, 1], 1, 0, "c")


def test_integers_that_wrap_take_any_product():
    config = LBA(None, Int(8, overflow="wrap"), None)
    a, b = torch.tensor([[12.0, 1.0]]), torch.tensor([[11.0], [128.0]])
    assert lba.matmul(a, b, config).item() == 260 - 256
    x, w = torch.full((1, 1, 3, 3), 12.0), torch.full((1, 1, 2, 2), 11.0)
    y = convolution(x, w, config.code, [1, 1], [0, 0], [1, 1], 1, 0, "c")
    assert torch.equal(y, torch.full((1, 1, 2, 2), 4 * 132.0 - 512))
    large = 2.0**25 + 4  # products of 2^50 + 2^28 + 16
    assert lba.matmul(a * 0 + large, b * 0 + large, config).item() == 32
    largest = torch.finfo(torch.float32).max
    assert lba.matmul(a * 0 + largest, b * 0 - largest, LBA(None, Int(32, overflow="wrap"), None)).item() == 0


@settings(max_examples=60)
@given(
    st.integers(4, 32), st.sampled_from([2.0**-4, 1.0, 4.0]), st.sampled_from([None, 3]), st.booleans(),
    st.integers(0, 2**31), st.integers(0, 30),
)  # fmt: skip
def test_wrapped_products_beyond_the_range_equal_the_fractions(bits, scale, chunk, rounded, seed, large):
    product = Float(6, -40, 60, rounding="nearest") if rounded else None
    config = LBA(product, Int(bits, overflow="wrap"), chunk, scale=scale)
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(3, 9, generator=generator) * 2.0**large, torch.randn(9, 4, generator=generator) * 2.0**large
    expected = [[float32(value) for value in row] for row in exact.matmul(as_floats(a), as_floats(b), config)]
    assert torch.equal(lba.matmul(a, b, config), torch.tensor(expected))
    assert torch.equal(reference.matmul(a, b, config), torch.tensor(expected))


@pytest.mark.parametrize("gradient", ["recursive_of", "immediate_of", "immediate_diff", "recursive_diff"])
def test_indicators_know_that_far_products_leave_the_range(gradient):
    config = LBA(None, Int(12, overflow="wrap"), 4, gradient=gradient)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(-3, 4, (4, 9), generator=generator).float(), torch.randint(-3, 4, (9, 5), generator=generator)
    a[:, ::3] *= 2.0**60  # multiples of the range, which change no sum; others do
    a[:, 1::3] *= 2.0**44 / 3
    x, w = a.clone().requires_grad_(), b.float().requires_grad_()
    lba.matmul(x, w, config).backward(torch.ones(4, 5))
    expected = reference.gradients(a, b.float(), torch.ones(4, 5), config)
    for found, wanted in zip((x.grad, w.grad), expected, strict=True):
        assert torch.equal(found.double(), wanted.float().double())


def test_products_that_never_occur_are_not_counted():
    config = LBA(None, Int(10), None)
    w, x = torch.tensor([[[[100.0]], [[1.0]]]]), torch.tensor([[[[1.0]], [[100.0]]]])
    arguments = (config.code, [1, 1], [0, 0], [1, 1])
    assert convolution(x, w, *arguments, 1, 0, "c").item() == 200
    w = w.view(2, 1, 1, 1)
    assert convolution(x, w, *arguments, 2, 0, "c").flatten().tolist() == [100, 100]
    with pytest.raises(RecoupError, match=r"products from .* to 10000 do not fit"):
        convolution(x.flip(1), w, *arguments, 2, 0, "c")
    w = torch.tensor([[[[-100.0]], [[1.0]]]])
    with pytest.raises(RecoupError, match=r"products from -10000 to .* do not fit"):
        convolution(x.flip(1), w, *arguments, 1, 0, "c")


def test_a_convolution_that_does_not_fit():
    x, w = pair((1, 3, 4, 4), (2, 2, 3, 3))
    with pytest.raises(RecoupError, match=r"c: the input .* must have 2 channels"):
        convolution(x, w, LBA().code, [1, 1], [0, 0], [1, 1], 1, 0, "c")
    x, w = pair((1, 2, 2, 2), (2, 2, 3, 3))
    with pytest.raises(RecoupError, match="larger than the padded input"):
        convolution(x, w, LBA().code, [1, 1], [0, 0], [1, 1], 1, 0, "c")


@pytest.mark.parametrize("config", [LBA(), LBA.fp32(), LBA.int16(), LBA.int16("wrap")], ids=repr)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_are_matrix_products(config, groups):
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-9, 10, (3, 4, 7, 9), generator=generator).float()
    w = torch.randint(-9, 10, (8, 4 // groups, 3, 2), generator=generator).float()
    if not isinstance(config.accumulator, Int):
        w = w / 7
    geometry = ([2, 1], [1, 2], [1, 2], groups)
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        y = convolution(layout, w, config.code, *geometry, 0, "c")
        expected = F.conv2d(x, w, None, *geometry)
        assert y.shape == expected.shape
        last = layout is not x
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        columns = F.unfold(x, (3, 2), (1, 2), (1, 2), (2, 1)).view(3, groups, -1, y.shape[2] * y.shape[3])
        for image in range(3):
            rows = [
                reference.matmul(w.view(groups, 8 // groups, -1)[g], columns[image, g], config) for g in range(groups)
            ]
            assert torch.equal(y[image].reshape(8, -1), torch.cat(rows))


def test_an_empty_batch():
    x, w = torch.zeros(0, 3, 5, 5), torch.ones(4, 3, 3, 3)
    assert convolution(x, w, LBA().code, [1, 1], [1, 1], [1, 1], 1, 0, "c").shape == (0, 4, 5, 5)
