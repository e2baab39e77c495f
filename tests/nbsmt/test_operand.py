"""Activation operands against a model written from the specification, exactly."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llvmlite import binding

from recoup.errors import RecoupError
from recoup.kernels import llvm
from recoup.nbsmt.codes import quantise_kernel, quantise_module
from recoup.nbsmt.combine import Recipe, combine_module
from recoup.nbsmt.config import NBSMT, PAIRINGS, POLICIES, ROUNDINGS
from recoup.nbsmt.groups import Activation, groups
from recoup.nbsmt.operand import operands
from tests.nbsmt.strategies import configs

ARM = llvm.Target("generic", "", frozenset(), "aarch64-unknown-linux-gnu")
LEVELS = ["x86-64", "haswell", "skylake-avx512"]


def runs_here(level: str) -> bool:
    x86 = binding.get_process_triple().startswith("x86_64")
    return x86 and llvm.Target.named(level).features <= llvm.host().features


PORTS = {0: (0, 15, 16), 5: (-16, 15, 8), 4: (-8, 7, 16)}
"""What fits, from and to, and the step of what does not: unsigned, signed on 5 and on 4 bits."""


def model(
    x: np.ndarray, scale: float, config: NBSMT, activations: tuple[Activation, ...], zero: int = 0
) -> tuple[np.ndarray, int]:
    """The operand's values and the faults, element by element as the specification says it."""
    T, (P, C) = config.threads, x.shape
    H = -(-C // T)
    with np.errstate(all="ignore"):
        code = np.clip(np.rint(x / np.float32(scale)), -zero, 255 - zero)
        code = np.nan_to_num(code, nan=-zero).astype(int)
    x_PC = np.pad(code, ((0, 0), (0, H * T - C)))
    low, high, step = PORTS[config.port if zero else 0]
    rounded = {"nearest": np.rint, "half_up": lambda v: np.floor(v + 0.5), "zero": np.trunc}[config.rounding]
    r_PC = (step * np.clip(rounded(x_PC / step), low, high)).astype(int)
    narrow = (x_PC >= low) & (x_PC <= high)
    if config.policy != "S":
        r_PC = np.where(narrow, x_PC, r_PC)
    value = {"0": 0 * x_PC, "x": x_PC, "r": r_PC, "narrow": x_PC * narrow, "wide": x_PC * ~narrow}
    owner = np.array([divmod(c, H) if config.pairing == "halves" else divmod(c, T)[::-1] for c in range(H * T)])
    channel = {(thread, slot): c for c, (thread, slot) in enumerate(owner)}
    out = []
    for activation in activations:
        n_PC = np.zeros((P, H * T), int)
        for c, (thread, slot) in enumerate(owner):
            for u in activation.partners:
                n_PC[:, c] += x_PC[:, channel[(thread + u) % T, slot]] != 0
        out.append(np.choose(np.minimum(n_PC, 2), [value[name] for name in activation.values]))
    faults = int(not zero and bool((x < 0).any())) + 2 * int(not np.isfinite(x).all())
    return np.concatenate(out, 1) if out else np.zeros((P, 0), int), faults


def activations_of(config: NBSMT) -> tuple[Activation, ...]:
    return tuple(group.activation for group in groups(config))


def draw(seed: int, P: int, C: int, zero: int = 0) -> np.ndarray:
    """Half zeros; codes all over their range and somewhat beyond, exact ties among them, with a scale of 1/8."""
    rng = np.random.default_rng(seed)
    x = (rng.integers(0, 560, (P, C)) - 2 * zero) / 16
    x = np.where(rng.random((P, C)) < 0.3, x + rng.random((P, C)), x)
    return np.where(rng.random((P, C)) < 0.5, 0, x).astype(np.float32)


BOTH = (torch.uint8, torch.float32)


def check(
    x: np.ndarray, scale: float, config: NBSMT, activations: tuple[Activation, ...], dtypes=BOTH, zero=0, **options
):
    expected, faults = model(x, scale, config, activations, zero)
    for dtype in dtypes:
        out, found = operands(torch.from_numpy(x), scale, config, activations, dtype, zero=zero, **options)
        assert out.dtype == dtype
        values = out.numpy().astype(int) - (zero if dtype == torch.uint8 else 0)
        assert np.array_equal(values, expected), (config, activations, x.shape, dtype)
        assert found == faults


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_policy(policy: str, threads: int):
    """Both pairings in vectors of whole pixels and in cut rows; roundings and types take turns."""
    for i, (pairing, C) in enumerate(product(PAIRINGS, (16, 76))):
        rounding = ROUNDINGS[(i + POLICIES.index(policy)) % 3]
        config = NBSMT(threads, policy, rounding, pairing)  # type: ignore[arg-type]
        check(draw(i, 9, C), 0.125, config, activations_of(config), (BOTH[(i + threads // 4) % 2],))
        if threads == 2 and i == POLICIES.index(policy) % 4:
            own, dtypes = config.replace(port=(5, 4)[i // 2]), (BOTH[i % 2],)
            check(draw(i, 9, C, 128), 0.125, own, activations_of(own), dtypes, 128)


@pytest.mark.parametrize("C", range(1, 71))
def test_every_width(C: int):
    """Channels that fill slots and vectors or do not; pixels that fill vectors and blocks or do not."""
    for threads in (2, 4):
        config = NBSMT(threads, pairing=PAIRINGS[C // 2 % 2], rounding=ROUNDINGS[C % 3])  # type: ignore[arg-type]
        activations = (Activation((1,), ("x", "r", "r")), Activation((1, threads - 1), ("0", "wide", "narrow")))
        for P in (0, 1, 6, 67):
            dtype = BOTH[(C + threads // 2) % 2]
            zero = 128 if P == 6 and C % 31 == 3 else 0
            check(draw(C, P, C, zero), 0.125, config, activations[: 1 if threads == 2 else 2], (dtype,), zero)


@settings(max_examples=40, deadline=None)
@given(
    configs,
    st.one_of(st.integers(1, 40), st.integers(41, 520)),
    st.integers(0, 300),
    st.integers(0, 2**12 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 128]),
)
@example(NBSMT(2, "S+A", "nearest", "halves"), 128, 70, 2**12 - 1, 0, 0)
@example(NBSMT(4, "S+A", "nearest", "halves"), 64, 131, 2**12 - 1, 0, 0)
@example(NBSMT(4, "S", "half_up", "adjacent"), 130, 40, 0b100000000011, 0, 0)
@example(NBSMT(4, "S", "zero", "halves", port=4), 130, 40, 0b100000000011, 0, 128)
def test_any_layer(config: NBSMT, C: int, P: int, kept: int, seed: int, zero: int):
    """Any configuration, any shape, any choice of groups (layers drop groups that meet no weight)."""
    every = activations_of(config)
    some = tuple(a for i, a in enumerate(every) if kept >> i & 1) or every[:1]
    check(draw(seed, P, C, zero), 0.125, config, some, zero=zero)


SPECIAL = {
    "ties go to even": ([0.5, 1.5, 2.5, 127.5, 253.5, 254.5, 255.5], [0, 2, 2, 128, 254, 254, 255], 0),
    "clipped above": ([255.49, 256, 1e30, 3.4e38], [255, 255, 255, 255], 0),
    "tiny": ([1e-45, 1e-38, 1e-20, 0.4999], [0, 0, 0, 0], 0),
    "negative zero is zero": ([-0.0, 1, -0.0], [0, 1, 0], 0),
    "negative": ([3, -0.2, 5], [3, 0, 5], 1),
    "negative and tiny": ([3, -1e-45, 5], [3, 0, 5], 1),
    "very negative": ([3, -3e38, 5], [3, 0, 5], 1),
    "not a number": ([3, np.nan, 5], [3, 0, 5], 2),
    "infinity": ([3, np.inf, 5], [3, 255, 5], 2),
    "negative infinity": ([3, -np.inf, 5], [3, 0, 5], 3),
    "NaN and negative": ([np.nan, -1, 5], [0, 0, 5], 3),
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("place", [0, 61, 64, 130])
def test_special_values(name: str, place: int):
    """In the first vector, across two, and in the tail that is not a whole vector."""
    values, codes, faults = SPECIAL[name]
    x = np.zeros(140, np.float32)
    x[place : place + len(values)] = values
    out, found = operands(torch.from_numpy(x.reshape(-1, 1)), 1.0, NBSMT(1), (Activation(),))
    expected = np.zeros(140, np.uint8)
    expected[place : place + len(values)] = codes
    assert np.array_equal(out.numpy().ravel(), expected)
    assert found == faults


SIGNED_SPECIAL = {
    "ties go to even": ([-0.5, -1.5, 2.5, -127.5, 126.5, 127.5, -128.5], [128, 126, 130, 0, 254, 255, 0], 0),
    "clipped at both ends": ([127.4, 128, 3e38, -128.6, -129, -3e38], [255, 255, 255, 0, 0, 0], 0),
    "tiny": ([1e-45, -1e-38, -0.0, -0.4999], [128, 128, 128, 128], 0),
    "not a number": ([3, np.nan, -5], [131, 0, 123], 2),
    "infinities": ([np.inf, -np.inf, 5], [255, 0, 133], 2),
}


@pytest.mark.parametrize("name", SIGNED_SPECIAL)
@pytest.mark.parametrize("scale", [1.0, 2.0**-70])
def test_special_values_of_signed_codes(name: str, scale: float):
    """In both forms of the quotient."""
    values, codes, faults = SIGNED_SPECIAL[name]
    x = np.zeros(140, np.float32)
    x[61 : 61 + len(values)] = np.float32(values) * np.float32(scale)
    out, found = operands(torch.from_numpy(x.reshape(-1, 1)), scale, NBSMT(1), (Activation(),), zero=128)
    expected = np.full(140, 128, np.uint8)
    expected[61 : 61 + len(values)] = codes
    assert np.array_equal(out.numpy().ravel(), expected)
    assert found == faults


def around_ties(scale: np.float32, zero: int = 0) -> np.ndarray:
    """The floats next to every place where the code changes: where a quotient off by one unit would show."""
    ties = ((np.arange(257) - zero + 0.5) * np.float64(scale)).astype(np.float32)
    return np.concatenate([(ties.view(np.int32) + i).view(np.float32) for i in range(-4, 5)])


@pytest.mark.parametrize("zero", [0, 128])
@pytest.mark.parametrize("fast", [False, True])
def test_quotient_is_a_division(fast: bool, zero: int):
    """Both forms of the quotient are IEEE's division at all 256 thresholds, for scales of all sizes and mantissas."""
    if fast and not llvm.host().fma:
        pytest.skip("no fused multiply-add on this processor")
    rng = np.random.default_rng(7)
    exponents = rng.integers(-64, 64, 1500) if fast else rng.integers(-140, 119, 1500)
    scales = (2.0**exponents * rng.uniform(1, 2, 1500)).astype(np.float32)
    edges = [np.nextafter(np.float32(2.0**e), np.float32(d)) for e in (-20, 0, 7) for d in (0, 1e30)]
    kernel = quantise_kernel(fast, None, zero)
    for scale in [*scales, *edges, np.float32(2.0**-64), np.float32(2.0**64)]:
        x = around_ties(scale, zero)
        codes = np.empty(x.size, np.uint8)
        kernel(x.ctypes.data, codes.ctypes.data, x.size, float(scale))
        assert np.array_equal(codes, np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.uint8)), scale


@pytest.mark.parametrize("scale", [2.0**-149, 1e-40, 2.0**-65, 2.0**-64, 1.0, 2.0**64, 2.0**65, 3e38])
def test_scales_of_any_size(scale: float):
    x = around_ties(np.float32(min(scale, 1e36))).reshape(-1, 1)
    x = np.concatenate([x, np.array([[1.0], [3e38], [1e-45]], np.float32)])
    check(np.abs(x), scale, NBSMT(1), (Activation(),))


@pytest.mark.parametrize("level", LEVELS)
def test_other_instruction_sets(level: str):
    """The same bits from the code for narrower and for older processors."""
    if not runs_here(level):
        pytest.skip(f"this processor does not run {level}")
    target = llvm.Target.named(level)
    for threads, pairing, C in ((2, "halves", 16), (4, "halves", 130), (4, "adjacent", 20), (1, "halves", 33)):
        config = NBSMT(threads, pairing=pairing)  # type: ignore[arg-type]
        x = draw(C, 50, C)
        check(x, 0.125, config, activations_of(config), target=target)
        x[7, 3] = np.nan
        check(x, 0.125, config, activations_of(config), target=target)
        if threads == 2:
            check(-x, 0.125, config, activations_of(config), target=target, zero=128)


def test_code_for_arm():
    """Vector code without library calls; it cannot be run here."""
    for module in (quantise_module(True), combine_module(Recipe(NBSMT(4), activations_of(NBSMT(4)), 16, False))):
        text = llvm.assembly(module, ARM)
        assert "v0.16b" in text
        assert "fmaf" not in text  # a call of the C library, number by number


@pytest.mark.parametrize("config", [NBSMT(1), NBSMT(2), NBSMT(4, pairing="adjacent")])
@pytest.mark.parametrize("C", [30, 128])
def test_thread_count_changes_nothing(config: NBSMT, C: int):
    x = torch.from_numpy(draw(3, 9001, C))
    x[8000, 5] = -1
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(operands(x, 0.125, config, activations_of(config)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(out, results[0][0]) and faults == 1 for out, faults in results)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("P", "C"), [(1, 1), (5, 3), (7, 16), (3, 70), (65, 64)])
def test_writes_and_reads_nothing_else(P: int, C: int, dtype: torch.dtype):
    """What lies behind the output stays, what lies behind the input does not matter."""
    config = NBSMT(2)
    activations = activations_of(config)
    width = len(activations) * -(-C // 2) * 2
    memory = torch.full((P * width + 256,), 77, dtype=dtype)
    x = torch.full((P * C + 256,), torch.nan)
    x[: P * C] = torch.from_numpy(draw(1, P, C)).ravel()
    out = memory[: P * width].view(P, width)
    result, faults = operands(x[: P * C].view(P, C), 0.125, config, activations, dtype, out)
    assert result is out
    assert faults == 0
    assert bool((memory[P * width :] == 77).all())
    assert np.array_equal(out.numpy(), model(x[: P * C].view(P, C).numpy(), 0.125, config, activations)[0])


def test_callers_on_many_threads():
    x = torch.from_numpy(draw(5, 500, 24))
    wanted = {T: operands(x, 0.125, NBSMT(T), activations_of(NBSMT(T)))[0] for T in (1, 2, 4)}
    with ThreadPoolExecutor(6) as pool:
        jobs = [1, 2, 4] * 8
        found = list(pool.map(lambda T: operands(x, 0.125, NBSMT(T), activations_of(NBSMT(T)))[0], jobs))
    assert all(torch.equal(out, wanted[T]) for T, out in zip(jobs, found, strict=True))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.float64), {}, "x must be float32"),
        (torch.zeros(4, 4).t()[1:], {}, "contiguous"),
        (torch.zeros(16), {}, r"x must be float32 \[P, C\]"),
        (torch.zeros(4, 4), {"dtype": torch.int8}, "must be torch.uint8 or torch.float32"),
        (torch.zeros(4, 4), {"out": torch.zeros(4, 4, dtype=torch.uint8)}, r"out must be torch.uint8 \[4, 8\]"),
        (torch.zeros(4, 4), {"scale": 0.0}, "must be a positive float32"),
        (torch.zeros(4, 4), {"scale": float("nan")}, "must be a positive float32"),
        (torch.zeros(4, 4), {"scale": 1e39}, "must be a positive float32"),
    ],
)
def test_refusals(x: torch.Tensor, options: dict, message: str):
    arguments = {"scale": 1.0, "config": NBSMT(2), "activations": activations_of(NBSMT(2)), **options}
    with pytest.raises(RecoupError, match=message):
        operands(x, **arguments)


def test_empty():
    out, faults = operands(torch.zeros(0, 5), 1.0, NBSMT(2), activations_of(NBSMT(2)))
    assert (tuple(out.shape), faults) == ((0, 12), 0)
    out, faults = operands(torch.zeros(3, 0), 1.0, NBSMT(2), activations_of(NBSMT(2)))
    assert (tuple(out.shape), faults) == ((3, 0), 0)
