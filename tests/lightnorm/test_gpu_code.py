"""The CUDA kernels through Triton's compiler, for GPUs that are not here. test_gpu.py runs this in its own process.

Exactness rests on products and sums that round separately, in float64, without approximations: none is in the code.
"""

import itertools
import os
import re

import pytest

from recoup.lightnorm.cpu_rounding import GENERAL, NONE, TRUNCATE

CAPABILITIES = (80, 90)
REDUCTION = {"STEPS": 16, "LANES": 512}
TILE = {"ROWS": 4, "COLUMNS": 256}
ROUNDINGS = [(NONE, False, False), (TRUNCATE, False, True), (GENERAL, True, False), (GENERAL, False, True)]
VALUES = ("normalize_kernel", "gradient_kernel", "extrema_kernel")
# Every kernel with every rounding and width; the processor takes turns, so that each of the three meets both.
TURNS = [
    (name, how, CAPABILITIES[(i + j + wide) % 2], wide)
    for i, name in enumerate(VALUES)
    for j, how in enumerate(ROUNDINGS)
    for wide in (False, True)
]
DOUBLES = ("sums", "ends", "out_sums", "out_ends", "plain", "cross", "mean", "reciprocal", "scale", "shift", "slope")


def compiled(name, capability, wide=False, **constants):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from recoup.lightnorm import gpu, gpu_kernels

    kernel = getattr(gpu_kernels, name)
    types = dict.fromkeys((*DOUBLES, "amounts"), "*fp64") | dict.fromkeys(("indices", "out_indices"), "*i64")
    types |= dict.fromkeys(("x", "g", "xhat", "y", "dx"), "*fp64" if wide else "*fp32")
    types |= {"keys": "*i64" if wide else "*i32", "found": "*i32"}
    if name == "normalize_kernel":  # the difference has a format of its own, and is rounded as the rest is
        constants |= {f"{given}_D": constants[given] for given in ("MODE", "NEAREST", "FLUSH")}
    values = ("mask", "low", "top", "spread", "depth")
    types |= dict.fromkeys((*values, *(f"{value}_D" for value in values)), "i64")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=gpu.OPTIONS).asm["ptx"]


anywhere = pytest.mark.parametrize(("capability", "wide"), list(itertools.product(CAPABILITIES, (False, True))))


class TestCompiler:
    __test__ = os.environ.get("RECOUP_TEST_COMPILER") == "1"

    def check(self, code, product):
        assert not re.search(r"fma\.|\.approx|\.ftz|mad\.\w*\.?f64", code)
        assert re.search(r"add(\.rn)?\.f64", code)
        assert bool(re.search(r"mul(\.rn)?\.f64", code)) == product

    @pytest.mark.parametrize(("capability", "wide"), [(80, True), (90, False)])  # they compile for seconds: in turns
    def test_sums(self, capability, wide):
        self.check(compiled("moments_kernel", capability, wide, **REDUCTION), False)
        self.check(compiled("products_kernel", capability, wide, **REDUCTION), True)

    @anywhere
    def test_pieces_are_joined(self, capability, wide):
        for log in (0, 1, 5):
            code = compiled("join_kernel", capability, ENDS=wide, PIECES=1 << log)
            self.check(code, False)

    @pytest.mark.parametrize(("name", "how", "capability", "wide"), TURNS)
    def test_values_round_as_written(self, name, how, capability, wide):
        sizes = {"LANES": 128} if name == "extrema_kernel" else TILE
        constants = dict(zip(("MODE", "NEAREST", "FLUSH"), how, strict=True))
        code = compiled(name, capability, wide, **constants, **sizes)
        assert not re.search(r"fma\.|\.approx|\.ftz", code)
        assert re.search(r"mul(\.rn)?\.f64", code)
        assert re.search(r"(add|sub)(\.rn)?\.f64", code)

    @anywhere
    def test_finite(self, capability, wide):
        infinite, absolute = ((0x7FF << 52, (1 << 63) - 1)) if wide else (0x7F800000, 0x7FFFFFFF)
        code = compiled("finite_kernel", capability, wide, INFINITE=infinite, ABSOLUTE=absolute, LANES=4096)
        assert not re.search(r"\.f(32|64)", code)  # bits only
