"""`quantize`: layouts, dtypes, gradients, randomness, tracing, and its errors."""

# ruff: noqa: A001, A002 - format is the word of the contract and of the field

import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import recoup.formats.ops  # noqa: F401 - registers the operators
from recoup import RecoupError
from recoup.formats import BlockFloat, Float, Int, quantize, reference
from tests.formats.inputs import assert_same_bits, patterns

FORMATS = [
    Float.parse("e4m3fn"),
    Float.parse("fp10_154"),
    Float.lba(8, 7, bias=127),  # wider than float32 at both ends
    Int(8),
    Int(6, signed=False, overflow="wrap"),
    BlockFloat(),
    BlockFloat(dim=-1, shared="max", rounding="nearest"),
    BlockFloat(11),
]
STOCHASTIC = [Float.ieee(5, 2, rounding="stochastic"), BlockFloat(rounding="stochastic")]


def ids(format: Any) -> str:
    return repr(format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("format", FORMATS, ids=ids)
def test_every_layout_gives_the_same_bits(format: Float | Int | BlockFloat, dtype: torch.dtype) -> None:
    x = patterns(dtype)[-6 * 10 * 8 * 5 :].reshape(6, 10, 8, 5)
    expected = reference.quantize(x, format)
    layouts = {
        "contiguous": x,
        "channels last": x.to(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "offset": torch.cat([x.flatten(), x.flatten()])[x.numel() :].view_as(x),
        "with gaps": torch.stack([x, x], dim=-1)[..., 0],
        "with gradient": x.clone().requires_grad_(),
        "channels last with gradient": x.to(memory_format=torch.channels_last).requires_grad_(),
        "inference": x,
    }
    for name, layout in layouts.items():
        before = layout.detach().clone()
        with torch.inference_mode(name == "inference"):
            y = quantize(layout, format)
        assert_same_bits(y.detach(), expected)
        assert_same_bits(layout.detach(), before)
        assert y.stride() == torch.empty_like(layout).stride(), name


@pytest.mark.parametrize("format", [*FORMATS, *STOCHASTIC], ids=ids)
def test_expanded_negated_empty_and_scalar_tensors(format: Float | Int | BlockFloat) -> None:
    ones = quantize(torch.ones(1, 1).expand(3, 4), format)
    assert torch.equal(ones, torch.ones(3, 4))
    imaginary = torch.tensor([[1 + 2j, 3 - 4j]]).conj().imag  # a view with the negative bit
    assert imaginary.is_neg()
    if format not in STOCHASTIC:
        assert_same_bits(quantize(imaginary, format), quantize(imaginary.clone(), format))
    assert quantize(torch.empty(2, 0, 3), format).shape == (2, 0, 3)
    if isinstance(format, BlockFloat):
        format = format.replace(dim=-1)
    assert quantize(torch.tensor(1.0), format).shape == ()
    assert quantize(torch.tensor(1.0), format) == 1


def test_wide_formats_leave_float32_as_it_is() -> None:
    x = patterns(torch.float32)
    for name in ("float32", "float64"):
        assert_same_bits(quantize(x, Float.parse(name).replace(overflow="inf")), x)
    x64 = patterns(torch.float64)
    assert_same_bits(quantize(x64, Float.parse("float64").replace(overflow="inf")), x64)
    # The largest float64 is no float32: an infinity stays one. The largest float32 is.
    infinity = torch.tensor([torch.inf])
    assert quantize(infinity, Float.parse("float64")) == torch.inf
    assert quantize(infinity, Float.parse("float32")) == torch.finfo(torch.float32).max


def test_float64_is_not_rounded_by_way_of_float32() -> None:
    x = torch.tensor([1.125 + 2.0**-40], dtype=torch.float64)  # as a float32 a tie, which would go down to 1
    assert quantize(x, Float.parse("e5m2")).item() == 1.25
    assert quantize(x.float(), Float.parse("e5m2")).item() == 1.0


@pytest.mark.parametrize("format", [*FORMATS, *STOCHASTIC], ids=ids)
def test_gradients_pass_straight_through(format: Float | Int | BlockFloat) -> None:
    x = torch.tensor([[1e30, -1e-30, 0.3, torch.inf], [1.0, -2.5, 0.0, 700.0]], requires_grad=True)
    gradient = torch.randn(2, 4)
    y = quantize(x, format)
    assert torch.equal(torch.autograd.grad(y, x, gradient)[0], gradient)
    assert not quantize(x.detach(), format).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("format", STOCHASTIC, ids=ids)
def test_stochastic_rounding_is_reproducible(format: Float | BlockFloat, dtype: torch.dtype) -> None:
    x = torch.randn(8, 12, 6, 5, dtype=dtype)

    def draw(x: Tensor, seed: int = 3) -> Tensor:
        return quantize(x, format, generator=torch.Generator().manual_seed(seed))

    assert_same_bits(draw(x), draw(x))
    assert not torch.equal(draw(x), draw(x, seed=4))
    assert_same_bits(draw(x.to(memory_format=torch.channels_last)), draw(x))  # by index, not by memory
    torch.manual_seed(3)
    assert_same_bits(quantize(x, format), draw(x))
    assert not torch.equal(quantize(x, format), quantize(x, format))


def test_stochastic_bits_are_the_same_where_float32_is_computed_in_float64() -> None:
    x = patterns(torch.float32)
    x = x[x.abs() < 2.0**100]
    wide = Float(7, -150, 120, rounding="stochastic")
    torch.manual_seed(0)
    y = quantize(x, wide)
    torch.manual_seed(0)
    random = torch.randint(1 << 30, x.shape, dtype=torch.int32)
    assert_same_bits(y, reference.quantize(x, wide, random))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1.1, 0.3, -3.4, 2.0**-16 * 0.37, 2.0**-16 * 2.0**-6])
def test_stochastic_rounding_is_unbiased(value: float, dtype: torch.dtype) -> None:
    format = Float.ieee(5, 2, rounding="stochastic")
    count = 200_000
    x = torch.full((count,), value, dtype=dtype)
    y = quantize(x, format, generator=torch.Generator().manual_seed(0)).double()
    low, high = y.abs().min(), y.abs().max()
    assert low <= abs(x[0]) <= high
    assert (high - low).item() == 2.0 ** (max(torch.frexp(x[0]).exponent.item() - 1, -14) - 2)
    up = (x[0].double().abs() - low) / (high - low)
    # Steps up are binomial: five standard deviations.
    deviation = (y.abs().mean() - x[0].double().abs()).abs() / (high - low)
    assert deviation < 5 * (up * (1 - up) / count) ** 0.5


def test_stochastic_overflow_and_underflow() -> None:
    x = torch.tensor([57344.0, 61440.0, 65536.0, torch.inf, 2.0**-15, -(2.0**-15)]).repeat(4000, 1)
    to_infinity = Float.ieee(5, 2, subnormals=False, rounding="stochastic", overflow="inf")
    y = quantize(x, to_infinity, generator=torch.Generator().manual_seed(0))
    assert (y[:, 0] == 57344).all()
    assert 0.4 < (y[:, 1] == torch.inf).float().mean() < 0.6
    assert (y[:, 2:4] == torch.inf).all()
    assert_same_bits(y[:, 4:], torch.tensor([0.0, -0.0]).repeat(4000, 1))
    assert (quantize(x, to_infinity.replace(overflow="saturate"))[:, :4] == 57344).all()


@pytest.mark.parametrize(
    ("x", "format", "message"),
    [
        ([1.0], Int(), r"quantize: x is a list; it must be a float32 or float64 tensor on cpu or cuda"),
        (
            torch.ones(2).half(),
            Int(),
            r"x is a float16 tensor on cpu; convert it with \.float\(\); it must be a float32",
        ),
        (torch.ones(2).bfloat16(), Int(), r"bfloat16 tensor on cpu; convert"),
        (torch.ones(2).int(), Int(), r"x is a int32 tensor on cpu; it must be"),
        (torch.ones(2), "e5m2", r"format is 'e5m2'; it must be a Float, an Int or a BlockFloat.*Float\.parse"),
        (torch.ones(2), Float, r"format is <class"),
        (torch.ones(2), BlockFloat(), r"BlockFloat\(.*dim=1.*\): dim must be a dimension of x, whose shape is \[2\]"),
        (torch.tensor(1.0), BlockFloat(), r"whose shape is \[\]"),
        (torch.ones(2), Int(32), r"Int\(bits=32.*float32 holds integers of at most 24 bits"),
    ],
)
def test_errors_name_what_was_asked(x: Any, format: Any, message: str) -> None:
    with pytest.raises(RecoupError, match=message):
        quantize(x, format)


def test_a_generator_elsewhere_is_refused() -> None:
    with pytest.raises(RecoupError, match="the generator is on cpu; it must be on x's device, meta"):
        quantize(torch.ones(2, device="meta"), STOCHASTIC[0], generator=torch.Generator())


OPERATORS = {Float: "quantize_float", Int: "quantize_int", BlockFloat: "quantize_block"}


@pytest.mark.parametrize("format", FORMATS, ids=ids)
def test_opcheck(format: Float | Int | BlockFloat) -> None:
    operator = getattr(torch.ops.recoup, OPERATORS[type(format)]).default
    random = () if isinstance(format, Int) else (None,)
    for x in (torch.randn(3, 5, 2, requires_grad=True), torch.randn(2, 5, 3, dtype=torch.float64).mT):
        torch.library.opcheck(operator, (x, *random, *format.to_dict().values()))


@pytest.mark.parametrize("format", [*FORMATS, *STOCHASTIC], ids=ids)
def test_compiles_as_one_graph(format: Float | Int | BlockFloat) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: quantize(x * 2, format) + 1, fullgraph=True, backend="aot_eager")
    for shape in ((4, 6), (3, 9)):  # the second makes shapes dynamic
        x = torch.randn(shape, requires_grad=True)
        torch.manual_seed(0)
        y = compiled(x)
        torch.manual_seed(0)
        assert_same_bits(y.detach(), quantize(x.detach() * 2, format) + 1)
        y.sum().backward()
        assert torch.equal(x.grad, torch.full(shape, 2.0))  # type: ignore[arg-type]


def test_a_refusal_while_tracing_says_why() -> None:
    with pytest.raises(Exception, match="float32 holds integers of at most 24 bits"):
        torch.compile(lambda x: quantize(x, Int(32)), fullgraph=True, backend="eager")(torch.ones(2))


@pytest.mark.parametrize("format", [Float.parse("e5m2"), Int(), BlockFloat(dim=0), BlockFloat(dim=-1)], ids=ids)
@pytest.mark.parametrize("batch_dim", [0, 1, 2])
def test_vmap(format: Float | Int | BlockFloat, batch_dim: int) -> None:
    x = torch.randn(5, 6, 7)
    expected = torch.stack([quantize(part, format) for part in x.unbind(batch_dim)])
    assert_same_bits(torch.vmap(lambda part: quantize(part, format), in_dims=batch_dim)(x), expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_as_asked(randomness: str) -> None:
    x = torch.full((3, 1000), 1.1)
    y = torch.vmap(lambda row: quantize(row, STOCHASTIC[0]), randomness=randomness)(x)  # type: ignore[arg-type]
    assert torch.equal(y[0], y[1]) == (randomness == "same")


def test_meta_tensors_and_pickled_formats() -> None:
    y = quantize(torch.empty(2, 3, device="meta"), pickle.loads(pickle.dumps(FORMATS[0])))
    assert y.shape == (2, 3)
    assert y.device.type == "meta"


def test_importing_needs_no_triton_and_compiles_nothing() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from recoup.formats import cpu_kernels, quantize\n"
        "assert 'recoup.formats.gpu' not in sys.modules\n"
        "assert not cpu_kernels.float_kernel.signatures\n"
        "from recoup.formats.ops import _gpu_quantize\n"
        "from recoup import RecoupError\n"
        "try: _gpu_quantize()\n"
        "except RecoupError as error: assert 'needs triton' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
