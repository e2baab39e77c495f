"""The operators against the port model and integer convolutions: no difference, on both backends."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import recoup as rc
from recoup.nbsmt import cpu, ops, reference
from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.ops import convolution
from recoup.nbsmt.prepare import prepare
from recoup.nbsmt.shapes import Shapes
from recoup.nbsmt.weights import quantize_weight
from tests.nbsmt import port
from tests.nbsmt.strategies import configs, operands, port_of

BACKENDS = ["int8", "float32"]


def backend(name):
    if name == "int8" and cpu.probe().name != "int8":
        pytest.skip("this CPU has no exact int8 convolution")
    return ops.backend(name)


@settings(max_examples=60, deadline=None)
@given(configs, st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_matmul_equals_the_port_model(config, seed, rows, size, columns, signed):
    x, w = operands(seed, rows, size, columns, signed=signed)
    fields = config.threads, config.policy, config.rounding, config.pairing, port_of(config, signed)
    expected, _ = port.matmul(x.tolist(), w.tolist(), *fields)
    assert rc.nbsmt.matmul(x, w, config).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(configs, st.integers(0, 2**32 - 1), st.integers(1, 600), st.sampled_from([0.0, 0.5, 0.95]), st.booleans())
def test_matmul_equals_the_reference_on_long_sums(config, seed, size, zeros, signed):
    x, w = operands(seed, 5, size, 6, zeros, signed)
    assert torch.equal(rc.nbsmt.matmul(x, w, config), reference.matmul(x, w, config))


@pytest.mark.parametrize("weight", [127, -128])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_matmul_at_the_extremes(threads, weight):
    x = torch.full((3, 600), 255, dtype=torch.uint8)
    w = torch.full((600, 2), weight, dtype=torch.int8)
    config = rc.NBSMT(threads=threads)
    assert torch.equal(rc.nbsmt.matmul(x, w, config), reference.matmul(x, w, config))
    lowest = torch.full((3, 600), -128, dtype=torch.int8)
    assert torch.equal(rc.nbsmt.matmul(lowest, w, config), reference.matmul(lowest, w, config))


def test_matmul_shapes():
    config = rc.NBSMT(threads=4)
    for m, k, n in [(0, 3, 2), (2, 0, 3), (2, 3, 0)]:
        out = rc.nbsmt.matmul(torch.zeros(m, k, dtype=torch.uint8), torch.zeros(k, n, dtype=torch.int8), config)
        assert out.shape == (m, n)
        assert out.dtype == torch.int32
        assert not out.any()


def test_matmul_refusals():
    x, w = operands(0, 2, 3, 2)
    with pytest.raises(rc.RecoupError, match=r"uint8 and w int8; got torch\.int16"):
        rc.nbsmt.matmul(x.short(), w, rc.NBSMT())
    with pytest.raises(rc.RecoupError, match=r"\[2, 3\] and \[2, 2\]"):
        rc.nbsmt.matmul(x, w[:2], rc.NBSMT())
    with pytest.raises(rc.RecoupError, match="32-bit accumulator"):
        rc.nbsmt.matmul(
            torch.zeros(1, 70000, dtype=torch.uint8), torch.full((70000, 1), -128, dtype=torch.int8), rc.NBSMT()
        )


def integer_convolution(x, weight, scale, config, geometry, zero=0):
    """Quantise, unfold to rows in (channel, tap) order, let each tap's channels share the multiplier, and scale."""
    stride, padding, dilation = geometry
    codes = torch.round(x / torch.tensor(scale)).clamp(-zero, 255 - zero)
    weight_codes, scale_O = quantize_weight(weight)
    n, c = x.shape[:2]
    taps = weight[0, 0].numel()
    columns = F.unfold(codes.double(), weight.shape[2:], dilation, padding, stride)
    x_TMC = (
        columns.view(n, c, taps, -1).permute(2, 0, 3, 1).reshape(taps, -1, c).to(torch.int8 if zero else torch.uint8)
    )
    w_TCO = weight_codes.flatten(2).permute(2, 1, 0)
    total = sum(reference.matmul(x_TMC[t], w_TCO[t], config).double() for t in range(taps))
    h = (x.shape[2] + 2 * padding[0] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
    y = total.float() * (scale_O * scale)
    return y.view(n, h, -1, weight.shape[0]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    config=configs,
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 19),
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 5), (2, 3)]),
    geometry=st.sampled_from([((1, 1), (1, 1), (1, 1)), ((2, 2), (0, 0), (1, 1)), ((1, 2), (2, 1), (2, 1))]),
    last=st.booleans(),
    zero=st.sampled_from([0, 128, 128]),
)
def test_convolution_equals_integers(name, config, seed, channels, kernel, geometry, last, zero):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, 7, 9, generator=generator)
    x = torch.where(x.abs() < 0.3, 0, x) if zero else x.relu()
    weight = torch.randn(5, channels, *kernel, generator=generator)
    weight = torch.where(torch.rand(weight.shape, generator=generator) < 0.3, 0, weight)
    scale = float(torch.tensor(float(x.max()) / (100 if zero else 200) + 0.001))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    with backend(name):
        y = convolution(x, weight, None, scale, config.code, *map(list, geometry), 1, "layer", zero)
    assert torch.equal(y, integer_convolution(x, weight, scale, config, geometry, zero))
    assert y.is_contiguous(
        memory_format=torch.channels_last if last and not x.is_contiguous() else torch.contiguous_format
    )


def stand_in(weight, stride, padding, dilation, groups, shape, layer):
    """oneDNN's 8-bit convolution as it is where it is exact, on any processor: bytes in, rounded sums out."""

    def convolve(operand):
        assert operand.dtype == torch.uint8
        assert operand.shape == shape
        return cpu.exact_convolution(operand, weight, stride, padding, dilation, groups, 2**31)

    return convolve


@settings(max_examples=15, deadline=None)
@given(
    config=configs,
    seed=st.integers(0, 2**31),
    channels=st.sampled_from([1, 3, 8]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 1, 1, 2, 3]),
)
def test_values_from_sums_over_bytes(config, seed, channels, kernel, stride, padding, dilation, groups):
    """The map that an image of zeros gives: every geometry, its borders, kernels that see nothing but padding."""
    generator = torch.Generator().manual_seed(seed)
    config = config if groups == 1 else config.replace(threads=1)
    x = torch.randn(2, channels * groups, 5, 6, generator=generator)
    x = torch.where(x.abs() < 0.3, 0, x)
    weight = torch.randn(2 * groups, channels, *kernel, generator=generator)
    weight = torch.where(torch.rand(weight.shape, generator=generator) < 0.3, 0, weight)
    rest = (weight, None, 0.02, config.code, list(stride), list(padding), list(dilation), groups, "layer", 128)
    with ops.backend("float32"):
        expected = convolution(x, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recoup.nbsmt.prepare.packed", stand_in)
        patch.setattr(ops, "current_backend", lambda: "int8")
        found = [convolution(x, *rest), convolution(x[:1], *rest)]
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected[:1])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_sum_beyond_24_bits_is_exact_or_correctly_rounded(name):
    x, weight = torch.full((1, 512, 3, 3), 255.0), torch.full((2, 512, 3, 3), 1.0)
    weight[1] = -1
    code, scale_O = quantize_weight(weight)
    with backend(name):
        y = convolution(x, weight, None, 1.0, rc.NBSMT(threads=1).code, [1, 1], [0, 0], [1, 1], 1, "layer")
        signed = convolution(-x, weight, None, 1.0, rc.NBSMT(threads=1).code, [1, 1], [0, 0], [1, 1], 1, "layer", 128)
    total = (255 * code.flatten(1).long().sum(1)).double()
    assert abs(int(total[0])) > 2**24
    assert torch.equal(y.flatten(), total.float() * scale_O)
    assert torch.equal(signed.flatten(), (total / 255 * -128).float() * scale_O)


@pytest.mark.parametrize("zero", [0, 128])
def test_a_grouped_convolution_runs_plain_8_bit(zero):
    x, weight = torch.rand(2, 6, 5, 5) - (0.5 if zero else 0), torch.randn(6, 1, 3, 3)
    for name in BACKENDS:
        with backend(name):
            y = convolution(x, weight, None, 0.01, rc.NBSMT(threads=1).code, [1, 1], [1, 1], [1, 1], 6, "layer", zero)
        code, scale_O = quantize_weight(weight)
        sums = F.conv2d(torch.round(x / 0.01).clamp(-zero, 255 - zero).double(), code.double(), None, 1, 1, 1, 6)
        assert torch.equal(y, sums.float() * (scale_O * 0.01).view(1, -1, 1, 1))


def arguments(**changes):
    values = {
        "x": torch.rand(2, 6, 5, 5), "weight": torch.randn(4, 6, 3, 3), "order": None, "scale": 0.01,
        "config": rc.NBSMT().code, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
        "layer": "'c1'",
    }  # fmt: skip
    return {**values, **changes}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.25])
def test_inputs_that_codes_cannot_hold_name_the_layer(bad):
    x = torch.rand(2, 6, 5, 5)
    x[1, 3, 2, 2] = bad
    with pytest.raises(rc.RecoupError, match=r"'c1'.*\[2, 6, 5, 5\].*" + ("negative" if bad == -0.25 else "NaN")):
        convolution(**arguments(x=x))


def test_weights_that_are_not_finite_name_the_layer():
    weight = torch.randn(4, 6, 3, 3)
    weight[2, 0, 0, 0] = float("nan")
    with pytest.raises(rc.RecoupError, match=r"'c1'.*output channel 2"):
        convolution(**arguments(weight=weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(rc.RecoupError, match=r"'c1'.*float32"):
        convolution(**arguments(x=torch.rand(2, 6, 5, 5, dtype=dtype)))


def test_an_empty_batch():
    y = convolution(**arguments(x=torch.rand(0, 6, 5, 5)))
    assert y.shape == (0, 4, 5, 5)


@pytest.mark.parametrize("zero", [0, 128])
def test_the_gradient_is_that_of_the_quantised_convolution(zero):
    values = arguments(
        x=(4 * torch.rand(2, 6, 5, 5) - (2 if zero else 0)).requires_grad_(),
        weight=torch.randn(4, 6, 3, 3, requires_grad=True),
        zero=zero,
    )
    x, weight = values["x"], values["weight"]
    grad = torch.randn(2, 4, 5, 5)
    convolution(**values).backward(grad)
    code, scale_O = quantize_weight(weight)
    step = torch.tensor(0.01)
    value = torch.round(x.detach() / step)
    xq = (value.clamp(-zero, 255 - zero) * step).requires_grad_()
    wq = (code * scale_O.view(-1, 1, 1, 1)).requires_grad_()
    F.conv2d(xq, wq, None, 1, 1).backward(grad)
    inside = (value <= 255 - zero) & (value >= -zero)
    assert torch.equal(x.grad, xq.grad * inside)
    assert torch.equal(weight.grad, wq.grad)
    clipped = x.grad[~inside & (x.detach() < 0)] if zero else x.grad[~inside]
    assert len(clipped)
    assert not clipped.any()


def test_opcheck():
    for last in (False, True):
        x = torch.rand(2, 6, 5, 5, requires_grad=True)
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_() if last else x
        values = arguments(x=x, weight=torch.randn(4, 6, 3, 3, requires_grad=True))
        torch.library.opcheck(convolution, (*values.values(), 128) if last else tuple(values.values()))


LAST = {"memory_format": torch.channels_last}
STRIDES = {
    "rows": (torch.empty(7, 6, 1, 1), torch.empty(4, 6)),
    "turned rows": (torch.empty(6, 7).t().reshape(7, 6, 1, 1), torch.empty(6, 4).t()),
    "images": (torch.empty(2, 6, 5, 5), torch.empty(4, 6, 3, 3)),
    "channels last": (torch.empty(2, 6, 5, 5, **LAST), torch.empty(4, 6, 3, 3, **LAST)),
    "either": (torch.empty(2, 6, 5, 5, **LAST), torch.empty(4, 6, 3, 3)),
    "turned images": (torch.empty(6, 2, 4, 5).permute(1, 0, 3, 2), torch.empty(4, 6, 3, 3, **LAST)),
    "every other pixel": (torch.empty(2, 6, 5, 10)[..., ::2], torch.empty(4, 6, 3, 3)),
}


@pytest.mark.parametrize("name", STRIDES)
def test_gradients_have_the_strides_that_compiled_code_expects(name):
    """Of torch.compile's inductor, which asserts those of the fake: with channels last, training ended there."""
    x, weight = (tensor.fill_(0.5).requires_grad_() for tensor in STRIDES[name])
    arguments = (weight, None, 0.01, NBSMT(2).code, [1, 1], [0, 0], [1, 1], 1, "layer")
    grad = torch.ones_like(convolution(x, *arguments))
    backward = (grad, x.detach(), weight.detach(), 0.01, [1, 1], [0, 0], [1, 1], 1, [True, True], 0)
    torch.library.opcheck(ops.convolution_backward, backward, test_utils="test_faketensor")
    grads = torch.autograd.grad(convolution(x, *arguments), [x, weight], grad)
    for found, own in zip(grads, (x, weight), strict=True):
        assert found.stride() == torch.empty_like(own).stride()


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_are_whole_under_autocast(size):
    """Backward inside it, as in many loops of training: matrix products were of bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(9, 40, size, size, generator=generator, requires_grad=True)
    weight = torch.randn(8, 40, 1, 1, generator=generator, requires_grad=True)

    def gradients():
        y = convolution(x, weight, None, 0.01, NBSMT(2).code, [1, 1], [0, 0], [1, 1], 1, "layer")
        return torch.autograd.grad(y, [x, weight], y.detach())

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients()
    assert all(map(torch.equal, found, expected))


def test_an_unknown_backend():
    with pytest.raises(rc.RecoupError, match="int8 or float32"), ops.backend("fp16"):
        pass


@pytest.mark.parametrize("channels", [5, 7, 4])
def test_a_wrong_number_of_channels_is_not_padded_away(channels):
    with pytest.raises(rc.RecoupError, match=r"'c1'.*must have 6 channels"):
        convolution(**arguments(x=torch.rand(2, channels, 5, 5)))


def test_a_kernel_larger_than_the_input():
    with pytest.raises(rc.RecoupError, match=r"'c1'.*larger than the padded input"):
        convolution(**arguments(x=torch.rand(2, 6, 2, 2), padding=[0, 0]))


@pytest.mark.parametrize("columns", [1, 7])
def test_tied_weights_that_lie_transposed_are_prepared_apart(columns):
    """[n, 1] and [1, n] have equal bytes and strides; of [n, n] neither form evicts the other."""
    tied = torch.nn.Parameter(torch.arange(1.0, 1 + 7 * columns).view(7, columns))
    arguments = (None, 0.01, NBSMT(2).code, [1, 1], [0, 0], [1, 1], 1, "layer")
    for weight in (tied, tied.t(), tied):
        x = torch.rand(3, weight.shape[1], 1, 1)
        assert torch.equal(convolution(x, weight, *arguments), convolution(x, weight.detach().clone(), *arguments))
    first = prepare(tied, NBSMT(2))
    assert prepare(tied.t(), NBSMT(2)) is not first
    assert prepare(tied, NBSMT(2)) is first


def test_many_sizes_of_images_are_packed_once_while_they_take_little(monkeypatch):
    made = []
    packing = cpu.Int8Convolution.__init__

    def counted(self, *arguments):
        made.append(arguments[-1])
        packing(self, *arguments)

    weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))

    def alternate():
        made.clear()
        for size in range(4, 12):
            x = torch.rand(1, 8, size, size)
            convolution(x, weight, None, 1 / 255, NBSMT(2).code, [1, 1], [1, 1], [1, 1], 1, "layer")
        return len(made)

    if cpu.probe().name != "int8":
        pytest.skip("no 8-bit convolution here, and nothing to pack")
    alternate()  # each shape is checked once a process
    monkeypatch.setattr(cpu.Int8Convolution, "__init__", counted)
    assert alternate() == 0


def test_kept_by_shape_few_whatever_they_take_and_more_while_they_are_small(monkeypatch):
    monkeypatch.setattr("recoup.nbsmt.shapes.BYTES", 10_000)
    kept = Shapes()
    for name in range(9):
        kept.keep((name,), name, 2000)
    assert list(kept) == [(4,), (5,), (6,), (7,), (8,)]
    for name in range(10, 15):
        kept.keep((name,), None, 50_000)
    assert list(kept) == [(11,), (12,), (13,), (14,)]
    for name in range(100):
        kept.keep((name, "nothing"), None, 0)
    assert len(kept) == 9  # a key is something
