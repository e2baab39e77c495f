"""The kernels against the reference, and both against fractions."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recoup import lba
from recoup.errors import RecoupError
from recoup.formats import Float, Int
from recoup.kernels.llvm import Target, host
from recoup.lba import LBA, cpu, reference
from tests.lba import exact
from tests.lba.strategies import as_floats, fits, float32, operands, others, truncating

TARGETS = [None, *(t for t in ("x86-64", "haswell", "skylake-avx512") if Target.named(t).features <= host().features)]


def modelled(a, b, config):
    rows = exact.matmul(as_floats(a), as_floats(b), config)
    return torch.tensor([[float32(value) for value in row] for row in rows])


def two(data):
    """This processor and one of the others: a drawn unit's kernels are built for each, which takes most of the time."""
    return None, data.draw(st.sampled_from(TARGETS[1:] or [None]))


def everywhere(a, b, config, seed=None, levels=TARGETS):
    """The product on every instruction path; they must agree."""
    results = []
    for level in levels:
        with cpu.target(level):
            results.append(lba.matmul(a, b, config, seed=seed))
    for result in results[1:]:
        assert torch.equal(results[0], result)
    return results[0]


@settings(max_examples=60)
@given(st.data())
def test_truncating_units_equal_the_fractions(data):
    config = data.draw(truncating())
    a, b = data.draw(operands(config))
    expected = modelled(a, b, config)
    assert torch.equal(reference.matmul(a, b, config), expected)
    assert torch.equal(everywhere(a, b, config, levels=two(data)), expected)


@settings(max_examples=40)
@given(st.data())
def test_other_units_equal_the_fractions(data):
    config = data.draw(others())
    a, b = data.draw(operands(config))
    assume(fits(a, b, config))
    expected = modelled(a, b, config)
    assert torch.equal(reference.matmul(a, b, config), expected)
    assert torch.equal(everywhere(a, b, config, levels=two(data)), expected)


STOCHASTIC = LBA(Float.lba(4, 6, bias=10, rounding="stochastic"), Float.lba(4, 5, bias=8, rounding="stochastic"), 7)
UNITS = [
    LBA(),
    LBA(underflow=False),
    LBA(chunk=None),
    LBA.m10e5(),
    LBA.biased(4, 3),
    LBA(product=None),
    LBA.sequential14(),
    LBA.fp32(),
    STOCHASTIC,
    LBA.int16(),
    LBA.int12("wrap", chunk=9),
]


@pytest.mark.parametrize("config", UNITS, ids=repr)
@pytest.mark.parametrize("shape", [(1, 33, 70, 65), (2, 17, 147, 40), (3, 9, 1, 3), (1, 130, 20, 2)])
@pytest.mark.parametrize("threads", [1, 2])
def test_ragged_shapes_batches_and_threads(config, shape, threads):
    B, M, K, N = shape
    generator = torch.Generator().manual_seed(M)
    a, b = (torch.randn(size, generator=generator) for size in ((B, M, K), (B, K, N)))
    if isinstance(config.accumulator, Int):
        a, b = (a * 8).round(), (b * 8).round()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = everywhere(a, b, config, seed=5)
    finally:
        torch.set_num_threads(before)
    for i in range(B):
        assert torch.equal(y[i], reference.matmul(a[i], b[i], config, 5, i * M * N))


@settings(max_examples=30)
@given(st.data())
def test_properties(data):
    config = data.draw(truncating())
    a, b = data.draw(operands(config))
    K = a.shape[1]
    y = lba.matmul(a, b, config)
    assert torch.equal(lba.matmul(-a, b, config), -y)
    pads = torch.nn.functional.pad
    assert torch.equal(lba.matmul(pads(a, [0, 5]), pads(b, [0, 0, 0, 5]), config), y)
    whole = config.replace(chunk=None)
    assert torch.equal(
        lba.matmul(a, b, config.replace(chunk=K + data.draw(st.integers(0, 9)))), lba.matmul(a, b, whole)
    )
    assert not torch.signbit(y[y == 0]).any()
    transposed = lba.matmul(b.t(), a.t(), config)
    assert torch.equal(transposed.t(), y)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 80))
def test_23_bits_to_nearest_is_sequential_float32(seed, K):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, K, generator=generator), torch.randn(K, 5, generator=generator)
    expected = np.zeros((4, 5), np.float32)
    for k in range(K):
        expected = (a[:, k, None].numpy() * b[None, k].numpy()).astype(np.float32) + expected
    nearest = Float.lba(8, 23, bias=128, rounding="nearest")
    for config in (LBA.fp32(), LBA(nearest, nearest, None)):
        assert np.array_equal(lba.matmul(a, b, config).numpy(), expected)


TIES = [
    # The product has more bits than the sum: 1.0625 is a tie of the accumulator, which 2^-60 breaks.
    (LBA(Float.parse("float32"), Float(3, -100, 100, False), None), [2.0**-60, 1.0625], 1.125),
    # Just below the smallest normal, which a float64 sum rounds up to.
    (LBA(Float.parse("float32"), Float.lba(4, 7, bias=10, rounding="nearest"), None), [2.0**-10, -(2.0**-70)], 0.0),
    # The same in the sums of chunks, whose format is promotion's.
    (LBA(Float(23, -200, 200), Float(23, -200, 200), 1, promotion=Float(3, -100, 100)), [2.0**-60, 1.0625], 1.125),
    (LBA(Float(7, -200, 200), Float(7, -200, 200), 1, promotion=Float(7, -9, 9, False)), [2.0**-9, -(2.0**-70)], 0.0),
]


@pytest.mark.parametrize(("config", "terms", "expected"), TIES)
def test_nearest_sums_round_once(config, terms, expected):
    a, b = torch.tensor([terms]), torch.ones(len(terms), 1)
    assert modelled(a, b, config).item() == expected
    assert everywhere(a, b, config).item() == expected


@settings(max_examples=80)
@given(st.data())
def test_nearest_sums_of_far_apart_terms_equal_the_fractions(data):
    """Ties and smallest normals of the sums, and terms that only float64 loses beside them."""
    edges = (st.sampled_from(values) for values in ((3, 7, 23), (-126, -10), (0, 100), (True, False)))
    nearest = st.builds(Float, *edges, st.just("nearest"))
    config = LBA(data.draw(nearest), data.draw(nearest), data.draw(st.sampled_from((1, 3))))
    config = config.replace(promotion=data.draw(st.none() | nearest), underflow=data.draw(st.integers(0, 3)) > 0)
    f = data.draw(st.sampled_from((config.accumulator, config.outer)))
    at = data.draw(st.sampled_from((f.min_exponent, -1)))
    far = data.draw(st.sampled_from((-60, -25)))
    bits = st.sampled_from((0.0, 2.0 ** -(f.mantissa + 1), 3 * 2.0 ** -(f.mantissa + 1)))
    signs = st.sampled_from((-1.0, 1.0))
    terms = [data.draw(signs) * (1 + data.draw(bits)) * 2.0**at]
    terms.insert(data.draw(st.integers(0, 1)), data.draw(signs) * 2.0 ** max(at + far, -126))
    terms += data.draw(st.lists(st.builds(lambda sign, bits: sign * (1 + bits) * 2.0**at, signs, bits), max_size=2))
    a, b = torch.tensor([terms]), torch.ones(len(terms), 1)
    assert torch.equal(everywhere(a, b, config, levels=two(data)), modelled(a, b, config))


def test_any_layout_is_read():
    a, b = torch.randn(12, 40), torch.randn(40, 50)
    y = lba.matmul(a, b, LBA())
    for other in (a.t().contiguous().t(), a.repeat_interleave(2, 1)[:, ::2], torch.stack([a, a], 2)[..., 0]):
        assert torch.equal(lba.matmul(other, b, LBA()), y)
    for other in (b.t().contiguous().t(), b.repeat_interleave(3, 0)[::3], torch.stack([b, b], 2)[..., 1]):
        assert torch.equal(lba.matmul(a, other, LBA()), y)
    batched = lba.matmul(a.expand(3, 2, 12, 40), b, LBA())
    assert torch.equal(batched, y.expand(3, 2, 12, 50))
    assert torch.equal(lba.matmul(a, b.expand(2, 40, 50), LBA()), y.expand(2, 12, 50))


@pytest.mark.parametrize("shape", [((0, 3), (3, 2)), ((2, 0), (0, 3)), ((2, 3), (3, 0)), ((0, 2, 3), (0, 3, 2))])
def test_nothing_to_sum(shape):
    a, b = torch.zeros(shape[0]), torch.zeros(shape[1])
    y = lba.matmul(a, b, LBA())
    assert y.shape == (a @ b).shape
    assert torch.equal(y, a @ b)


def test_a_long_sum():
    a, b = torch.full((1, 200_000), 0.01), torch.full((200_000, 1), 0.01)
    a[:, 2000:] = 0.0
    config = LBA.biased(10, 5, chunk=512)
    expected = reference.matmul(a[:, :2000], b[:2000], config)
    assert torch.equal(lba.matmul(a, b, config), expected)
    promoted = config.replace(promotion=Float.parse("float32"))  # float64 lanes
    assert torch.equal(lba.matmul(a, b, promoted), reference.matmul(a[:, :2000], b[:2000], promoted))


def test_the_control_word_stays_here():
    tiny = torch.full((64,), 1e-40)
    a, b = torch.randn(96, 128), torch.randn(128, 160)
    expected = lba.matmul(a, b, LBA())
    seen = []

    def elsewhere():
        lba.matmul(a, b, LBA())
        seen.append(bool((tiny * 0.5 > 0).all()))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [True]
    assert (tiny * 0.5 > 0).all()
    assert (np.full(64, 1e-40, np.float32) * np.float32(0.5) > 0).all()
    if torch.set_flush_denormal(True):
        try:
            assert torch.equal(lba.matmul(a, b, LBA()), expected)
            assert torch.equal(lba.matmul(a, b, LBA(underflow=False)), reference.matmul(a, b, LBA(underflow=False)))
            assert (tiny * 0.5 == 0).all()
        finally:
            torch.set_flush_denormal(False)


def test_stochastic_rounding_is_unbiased():
    a, b = torch.rand(64, 40) + 0.5, torch.rand(40, 64)
    wide = Float.lba(6, 4, bias=20, rounding="stochastic")
    mean = torch.stack([lba.matmul(a, b, LBA(wide, wide, 8), seed=seed) for seed in range(20)]).mean(0)
    truncated = lba.matmul(a, b, LBA(wide.replace(rounding="zero"), wide.replace(rounding="zero"), 8))
    exact_sum = a @ b
    assert float(((mean - exact_sum) / exact_sum).mean().abs()) < 0.002
    assert float(((truncated - exact_sum) / exact_sum).mean()) < -0.05


def test_seeds():
    a, b = torch.randn(8, 30), torch.randn(30, 8)
    one = lba.matmul(a, b, STOCHASTIC, seed=1)
    assert torch.equal(one, lba.matmul(a, b, STOCHASTIC, seed=1))
    assert not torch.equal(one, lba.matmul(a, b, STOCHASTIC, seed=2))
    torch.manual_seed(3)
    drawn = lba.matmul(a, b, STOCHASTIC)
    torch.manual_seed(3)
    assert torch.equal(drawn, lba.matmul(a, b, STOCHASTIC))
    with pytest.raises(RecoupError, match="seed must be"):
        lba.matmul(a, b, STOCHASTIC, seed=-1)


def test_unknown_targets_are_refused():
    with pytest.raises(RecoupError, match="levels are"), cpu.target("pentium"):
        pass


@settings(max_examples=50)
@given(
    st.integers(4, 24), st.sampled_from((1.0, 0.25, 8.0)), st.sampled_from((None, 2)),
    st.lists(st.tuples(*(st.integers(-255, 255), st.integers(-40, 40)) * 2), min_size=1, max_size=6),
)  # fmt: skip
def test_wide_sums_that_wrap_equal_the_fractions(bits, scale, chunk, terms):
    """Products of many binades, whose sums float64 does not hold: modulo the range they are still exact."""
    config = LBA(None, Int(bits, overflow="wrap"), chunk, scale=scale)
    a, b = ([[float(i * 2.0**e) for i, e in pairs]] for pairs in ((t[:2] for t in terms), (t[2:] for t in terms)))
    columns = [[v] for v in b[0]]
    found = reference.matmul(torch.tensor(a), torch.tensor(columns), config)
    assert found.item() == float(exact.matmul(a, columns, config)[0][0])


@pytest.mark.parametrize("rows", [4, 5, 33])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("level", ["haswell", "x86-64"])
def test_subnormal_operands_count_beside_huge_ones(rows, swapped, level):
    """1e-39 times 1e38 is 0.1, also where a tile's or a panel's elements are copied while results are flushed."""
    small, huge = (1e38, 1e-39) if swapped else (1e-39, 1e38)
    a, b = torch.full((rows, 4), small), torch.full((4, 64), huge)
    with cpu.target(level):
        got = lba.matmul(a, b, LBA())
    assert torch.equal(got, reference.matmul(a, b, LBA()))
    assert bool((got > 0.39).all())
