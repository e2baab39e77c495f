"""Block scales: the reference against stored instructions and fractions, the float64 path against the reference."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import recoup as rc
from recoup.errors import RecoupError
from recoup.grammar import parse_config
from recoup.tensorcore import TensorCore, block_cpu, block_ops, block_reference, blocks, matmul, quantize_blocks
from recoup.tensorcore.config import SCALES
from tests.tensorcore import letter
from tests.tensorcore.strategies import same

VECTORS = Path(__file__).with_name("block_vectors.npz")  # of MMA-Sim (Microsoft, MIT, arXiv 2511.10909)
UNITS = {
    "mxfp8": TensorCore.blackwell_mxfp8(),
    "mxfp8_e5m2": TensorCore.blackwell_mxfp8(operands=("e5m2", "e4m3fn")),
    "mxfp4": TensorCore.blackwell_mxfp4(),
    "mxfp4_16": TensorCore.blackwell_mxfp4(block=16),
    "nvfp4": TensorCore.blackwell_nvfp4(),
}
MX, NV = UNITS["mxfp8"], UNITS["nvfp4"]
KINDS = ("codes", "zeros", "large", "near scales", "far scales", "cancelling")


def drawn(unit, shape, kind, seed):
    """a, b, scale_a, scale_b of the unit's formats."""
    M, K, N = shape
    generator, made = torch.Generator().manual_seed(seed), []

    def picked(values, size):
        return torch.tensor(values)[torch.randint(len(values), size, generator=generator)]

    for form, size in zip(unit.formats, ((M, K), (K, N)), strict=True):
        values = form.values()[-4:] if kind == "large" else form.values()
        x = picked(values, size) * (torch.randint(2, size, generator=generator) * 2 - 1)
        made.append(x * (torch.rand(size, generator=generator) < 0.4) if kind == "zeros" else x)
    a, b = made
    if kind == "cancelling":
        half = K // 2
        a[:, half : 2 * half], b[half : 2 * half] = -a[:, :half], b[:half].clone()
    S, reach = -(-K // unit.block), {"near scales": 2, "far scales": 126}.get(kind, 12)
    for size in ((M, S), (S, N)):
        if unit.scale_format == "ue8m0":
            made.append(2.0 ** torch.randint(-reach - 1, reach + 1, size, generator=generator))
        else:
            values = SCALES["ue4m3"].values()
            made.append(picked(values[40:60] if kind == "near scales" else values, size))
    return a, b, *made[2:]


def step_by_hand(c, a, b, scale_a, scale_b, unit):
    """In fractions; every k has its scales."""
    smallest = -127 if unit.scale_format == "ue8m0" else -6

    def exponent(s):
        return _exponent(Fraction(s), smallest)

    (first, second), terms = unit.pair, [(Fraction(c), letter.exponent_of(Fraction(c), "float32"))]
    products = [
        (Fraction(x) * Fraction(y) * Fraction(s) * Fraction(t), exponent(s) + exponent(t))
        for x, y, s, t in zip(a, b, scale_a, scale_b, strict=True)
    ]
    if first == second == "e2m1fn":
        terms += [(sum(p for p, _ in products[k : k + 16]), products[k][1]) for k in range(0, len(products), 16)]
    else:
        own = [
            letter.exponent_of(Fraction(x), first) + letter.exponent_of(Fraction(y), second)
            for x, y in zip(a, b, strict=True)
        ]
        terms += [(p, e + more) for (p, e), more in zip(products, own, strict=True)]
    q = letter.power(max(e for _, e in terms) - unit.fraction)
    total = sum(letter.toward_zero(x / q) for x, _ in terms) * q
    return letter.rounded(total, 23, -126, Fraction(2) ** 128, nearest=False)


def _exponent(x, smallest):
    if x == 0:
        return -126
    e = smallest
    while x >= letter.power(e + 1):
        e += 1
    return e


@given(
    st.sampled_from(["mxfp8", "mxfp8_e5m2"]),
    st.tuples(st.integers(1, 9), st.integers(1, 300), st.integers(1, 70)),
    st.sampled_from(KINDS[:3]),
    st.sampled_from([0, 2, 12, 50, 95]),
    st.sampled_from([None, 64]),
    st.integers(0, 2**30),
)
@settings(max_examples=20)
def test_kernels_without_scales_equal_those_with(name, shape, kind, reach, promotion, seed):
    """Exponents of zeros and subnormal numbers are their scales' too; bytes hold them up to a reach of about 20."""
    unit = UNITS[name].replace(promotion=promotion)
    a, b, s, t = drawn(unit, shape, kind, seed)
    s, t = (2.0 ** (x.log2() * reach / 13).round() for x in (s, t))
    given = [x[None] for x in (a, b, s, t)]
    got = block_cpu.quick(*given, unit)
    assert got is not None
    assert same(got, block_cpu.products(*given, unit))
    small = [x[:3] if x is a or x is s else x[:, :3] for x in (a, b, s, t)]
    assert same(got[0, :3, :3], block_reference.matmul(*small, unit))


def test_what_is_amiss_goes_the_way_that_names_it():
    a, b, s, t = (x[None] for x in drawn(MX, (5, 70, 9), "codes", 0))
    assert block_cpu.quick(a, b, s, t, MX) is not None
    for x, value in (
        (a, math.inf),
        (b, math.nan),
        (a, 0.3),
        (b, 464.0 * 2),
        (s, math.nan),
        (t, 2.0**-127),
        (s, 2.0**127),
    ):
        before = x[0, 3 % x.shape[1], 2].item()
        x[0, 3 % x.shape[1], 2] = value
        assert block_cpu.quick(a, b, s, t, MX) is None
        x[0, 3 % x.shape[1], 2] = before
    assert block_cpu.quick(*(x[None] for x in drawn(NV, (5, 70, 9), "codes", 0)), NV) is None


@pytest.mark.parametrize("name", UNITS)
def test_stored_instructions_of_the_public_model(name):
    unit = UNITS[name]
    with np.load(VECTORS) as stored:
        a, b, s, t, c, d = (stored[f"{name}/{key}"].astype(float) for key in ("a", "b", "scale_a", "scale_b", "c", "d"))
    assert len(c) == 60
    s, t = (np.repeat(x, unit.block, 1) for x in (s, t))
    for row in range(len(c)):
        lists = (x[row].tolist() for x in (a, b, s, t))
        got = block_reference.step(float(c[row]), *lists, unit)
        assert (got, math.copysign(1, got)) == (d[row], math.copysign(1, d[row]))


@given(st.sampled_from(sorted(UNITS)), st.integers(1, 100), st.sampled_from(KINDS), st.integers(0, 2**30))
@settings(max_examples=10)
def test_the_reference_equals_the_fractions(name, K, kind, seed):
    unit = UNITS[name]
    a, b, s, t = drawn(unit, (2, K, 2), kind, seed)
    every = [x.repeat_interleave(unit.block, 1)[:, :K].tolist() for x in (s, t.mT)]
    expected = torch.zeros(2, 2)
    for m in range(2):
        for n in range(2):
            c, row, column = 0.0, a[m].tolist(), b[:, n].tolist()
            for k in range(0, K, unit.group):
                own = slice(k, k + unit.group)
                c = (
                    c
                    if math.isinf(c)
                    else step_by_hand(c, row[own], column[own], every[0][m][own], every[1][n][own], unit)
                )
            expected[m, n] = c
    assert same(block_reference.matmul(a, b, s, t, unit), expected)


@given(
    st.sampled_from(sorted(UNITS)),
    st.tuples(st.integers(1, 4), st.integers(1, 300), st.integers(1, 5)),
    st.sampled_from(KINDS),
    st.sampled_from([None, 1, 2]),
    st.integers(0, 2**30),
)
@settings(max_examples=50)
def test_products_equal_the_reference(name, shape, kind, promotion, seed):
    unit = UNITS[name]
    unit = unit.replace(promotion=promotion and promotion * unit.group)
    given = drawn(unit, shape, kind, seed)
    expected = block_reference.matmul(*given, unit)
    assert same(blocks.products(*(x[None] for x in given), unit)[0], expected)
    assert same(block_cpu.products(*(x[None] for x in given), unit)[0], expected)
    a, b, s, t = given
    assert same(matmul(a, b, unit, scale_a=s, scale_b=t), expected)


@pytest.mark.parametrize("name", UNITS)
def test_more_columns_than_a_tile_and_threads(name):
    """The kernels' edges: a last tile that is not full, and rows that threads share."""
    unit, threads = UNITS[name], torch.get_num_threads()
    given = drawn(unit, (37, 131, 150), "codes", 7)
    expected = blocks.products(*(x[None] for x in given), unit)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert same(block_cpu.products(*(x[None] for x in given), unit), expected)
    finally:
        torch.set_num_threads(threads)


def test_batches_broadcast_and_rows_may_be_split(monkeypatch):
    a, b, s, t = drawn(MX, (6, 70, 3), "codes", 1)
    whole = matmul(a, b, MX, scale_a=s, scale_b=t)
    both = matmul(a.view(2, 1, 3, 70), torch.stack([b, -b]), MX, scale_a=s.view(2, 1, 3, 3), scale_b=t)
    assert same(both[:, 0].reshape(6, 3), whole)
    assert same(both[:, 1].reshape(6, 3), -whole + 0.0)
    monkeypatch.setattr(blocks, "TERM_BYTES", 1)
    assert same(blocks.products(*(x[None] for x in (a, b, s, t)), MX)[0], whole)
    assert matmul(a[:, :0], b[:0], MX, scale_a=s[:, :0], scale_b=t[:0]).eq(0).all()


def test_powers_of_two_commute_with_the_unit():
    """Scales of one size are one factor: the sum is that of the unit without, as far as the exponents reach."""
    a, b, _, _ = drawn(MX, (3, 64, 4), "codes", 2)
    plain = matmul(a, b, TensorCore.blackwell_fp8())
    ones = torch.ones(3, 2), torch.ones(2, 4)
    assert same(matmul(a, b, MX, scale_a=ones[0], scale_b=ones[1]), plain)
    assert same(matmul(a, b, MX, scale_a=8 * ones[0], scale_b=ones[1] / 2), 4 * plain)


def test_gradients_opcheck_and_flushing():
    a, b, s, t = drawn(NV, (3, 40, 4), "near scales", 3)
    a, b = a.requires_grad_(), b.requires_grad_()
    grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    matmul(a, b, NV, scale_a=s, scale_b=t).backward(grad)
    left, right = (x.repeat_interleave(16, d) for x, d in ((s, 1), (t, 0)))
    assert torch.allclose(a.grad, (grad @ (b.detach() * right[:40]).mT) * left[:, :40])
    assert torch.allclose(b.grad, ((a.detach() * left[:, :40]).mT @ grad) * right[:40])
    leaves = (v.detach()[None].requires_grad_() for v in (a, b))
    opcheck(block_ops.product, (*leaves, s[None], t[None], NV.code, "layer", "a b"))
    low = torch.full((1, 1), 2.0**-127)  # a subnormal number of float32
    one, high = torch.ones(1, 1), torch.full((1, 1), 2.0**127)
    assert torch.set_flush_denormal(True)
    try:
        got = matmul(one, one, MX, scale_a=low, scale_b=high)
    finally:
        torch.set_flush_denormal(False)
    assert got.item() == 1


def test_what_is_not_finite():
    unit = TensorCore.blackwell_mxfp8(operands=("e5m2", "e4m3fn"), nonfinite="propagate")
    a, b, s, t = drawn(unit, (4, 64, 4), "zeros", 4)
    a[0, 3], a[1, 5], b[7, 2], t[1, 3] = math.inf, -math.inf, math.nan, math.nan
    got = matmul(a, b, unit, scale_a=s, scale_b=t)
    assert same(got, block_reference.matmul(a, b, s, t, unit))
    assert got[:, 3].isnan().all()
    with pytest.raises(RecoupError, match="scale_b has 1 NaN"):
        matmul(a.nan_to_num(0, 0, 0), b.nan_to_num(0), unit.replace(nonfinite="error"), scale_a=s, scale_b=t)


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("side", ["a", "b"])
def test_quantised_blocks_are_the_units_operands(name, side):
    unit = UNITS[name]
    x = torch.randn(70, 70, generator=torch.Generator().manual_seed(5)) * 2.0 ** torch.arange(-35, 35)
    x[:, 3] = 0
    y, scale = quantize_blocks(x, unit, side)
    form, own = unit.formats["ab".index(side)], SCALES[unit.scale_format]
    assert unit.block is not None
    blocks_K = -(-70 // unit.block)
    assert scale.shape == ((70, blocks_K) if side == "a" else (blocks_K, 70))
    assert block_reference.foreign_scale(scale, unit.scale_format) is None
    assert torch.equal(rc.quantize(y, form), y)
    assert scale.min() >= (2.0**-127 if unit.scale_format == "ue8m0" else own.smallest_subnormal)
    ends = [slice(k, k + unit.block) for k in range(0, 70, unit.block)]
    along, y, scale = (t if side == "a" else t.mT for t in (x, y, scale))
    for index, part in enumerate(ends):
        top = along[:, part].abs().amax(1)
        if unit.scale_format == "ue8m0":
            floors = [max(math.frexp(v)[1] - 1, -126) if v else -126 for v in top.tolist()]
            expected = [2.0 ** (floor - form.max_exponent) for floor in floors]
            assert scale[:, index].tolist() == [max(v, 2.0**-127) for v in expected]
        assert torch.equal(y[:, part], rc.quantize(along[:, part] / scale[:, index, None], form))


def test_what_blocks_are_for():
    """Per-block scales keep both halves of a row whose magnitudes are far apart."""
    x = torch.cat([torch.randn(8, 64), 1e-4 * torch.randn(8, 64)], 1)
    w = torch.cat([torch.zeros(64, 5), torch.randn(64, 5)])
    (a, s), (b, t) = quantize_blocks(x, NV, "a"), quantize_blocks(w, NV, "b")
    got, exact = matmul(a, b, NV, scale_a=s, scale_b=t), x @ w
    assert (got - exact).norm() < 1.2 * exact.norm()  # below e4m3's own reach: NVFP4 has one more scale a tensor
    (a, s), (b, t) = quantize_blocks(x, MX, "a"), quantize_blocks(w, MX, "b")
    assert (matmul(a, b, MX, scale_a=s, scale_b=t) - exact).norm() < 0.1 * exact.norm()


def test_configs_round_trip():
    for unit in (*UNITS.values(), TensorCore.blackwell_nvfp4(scale="calibrated")):
        assert parse_config(repr(unit)) == unit == TensorCore.from_code(unit.code)
    for name in ("mxfp8", "mxfp4", "nvfp4"):
        assert parse_config(f"blackwell-{name}") == UNITS[name]
    assert TensorCore("e2m1") == TensorCore("e2m1fn")
    assert rc.Float.parse("e2m1") == rc.Float.parse("e2m1fn")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"block": 32}, "scales of operands 'e4m3fn' are ue8m0 per 32"),
        ({"block": 16, "scale_format": "ue8m0"}, "scales of operands 'e4m3fn' are ue8m0 per 32"),
        ({"block": 32, "scale_format": "ue4m3", "operands": "e2m1"}, "ue4m3 per 16 or ue8m0 per 16 or ue8m0 per 32"),
        ({"block": 32, "scale_format": "ue8m0", "operands": "bfloat16"}, "operands of 16 bits have no block scales"),
        ({"block": 32, "scale_format": "ue8m0", "operands": "e2m1", "group": 24}, "group must be a multiple of 16"),
        ({"block": 32, "scale_format": "ue8m0"}, "block-scaled units have output='float32'"),
        (
            {"block": 32, "scale_format": "ue8m0", "output": "float32", "scale": "calibrated"},
            "block scales of ue8m0 are the call's own",
        ),
    ],
)
def test_configs_that_are_refused(options, told):
    with pytest.raises(RecoupError, match=told):
        TensorCore(**options)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scale_a": None}, r"scale_a must be float32 \[..., 2, 2\], a scale for every 32 of K = 40; got None"),
        ({"scale_b": torch.ones(2, 4)}, r"scale_b must be float32 \[..., 2, 3\]"),
        ({"scale_a": torch.full((2, 2), 3.0)}, "scale_a holds 3.0, which is no value of ue8m0"),
        ({"scale_a": torch.zeros(2, 2)}, "scale_a holds 0.0, which is no value of ue8m0"),
        ({"scale_b": torch.ones(2, 3).double()}, "scale_b must be a dense float32 tensor"),
        ({"a": torch.full((2, 40), 1.1)}, r"a holds 1\.10.*, which is no value of e4m3fn"),
        ({"b": torch.full((40, 3), math.nan)}, "b has 120 elements that are NaN or infinite"),
        ({"scale_a": torch.ones(5, 2, 2), "b": torch.ones(3, 40, 3)}, "do not broadcast"),
    ],
)
def test_operands_that_are_refused(change, told):
    given = {"a": torch.ones(2, 40), "b": torch.ones(40, 3), "scale_a": torch.ones(2, 2), "scale_b": torch.ones(2, 3)}
    given |= change
    with pytest.raises(RecoupError, match=told):
        matmul(given["a"], given["b"], MX, scale_a=given["scale_a"], scale_b=given["scale_b"])


def test_operands_of_blocks_that_are_refused():
    with pytest.raises(RecoupError, match="has no block scales"):
        quantize_blocks(torch.ones(2, 2), TensorCore())
    with pytest.raises(RecoupError, match="side must be one of 'a', 'b'"):
        quantize_blocks(torch.ones(2, 2), MX, "c")
    with pytest.raises(RecoupError, match="finite float32 matrix"):
        quantize_blocks(torch.full((2, 2), math.inf), MX)
    with pytest.raises(RecoupError, match=r"scale_a holds -1\.0, which is no value of ue4m3"):
        matmul(torch.ones(1, 16), torch.ones(16, 1), NV, scale_a=-torch.ones(1, 1), scale_b=torch.ones(1, 1))


@pytest.mark.parametrize("name", UNITS)
def test_blocks_of_zeros_and_of_subnormals_have_scales_in_threads_that_flush_too(name):
    config = UNITS[name]
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    x[:, 32:64], x[:, 64:96] = 0, 1e-41
    expected = quantize_blocks(x, config)
    torch.set_flush_denormal(True)
    try:
        found = quantize_blocks(x, config)
        with pytest.raises(RecoupError, match="without gradients"):
            quantize_blocks(x.clone().requires_grad_(), config)
    finally:
        torch.set_flush_denormal(False)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
        assert bool(one.isfinite().all())
