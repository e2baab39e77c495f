"""The CUDA kernels through Triton's compiler, for GPUs that are not here. test_gpu.py runs this in its own process.

What exactness rests on is in the machine code, and nothing that would break it.
"""

import os
import re

import pytest

from recoup.tensorcore import TensorCore
from recoup.tensorcore.wing import CARD

WIDEST = TensorCore("e2m1fn", 64, 35, "float32")
UNITS = {
    "hopper-fp8": CARD.presets["hopper-fp8"],
    "hopper-fp8, promoted": TensorCore.hopper_fp8(promotion=128),
    "hopper-f16, float16": TensorCore.hopper_f16(output="float16"),
    "ampere-tf32": CARD.presets["ampere-tf32"],
    "35 bits": WIDEST,
}


class TestCompiler:
    __test__ = os.environ.get("RECOUP_TEST_COMPILER") == "1"

    def code(self, kernel, capability, **constants):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from recoup.tensorcore.gpu import OPTIONS

        types = dict.fromkeys(("x", "parts", "faults", "a", "b", "y"), "*i32")
        types |= dict.fromkeys(("batch_stride", "k_stride", "stride"), "i64") | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, places)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS).asm

    @pytest.mark.parametrize(
        ("name", "capability"), [*((name, 90) for name in UNITS), ("hopper-fp8", 80), ("hopper-f16, float16", 120)]
    )
    def test_products_are_integer_arithmetic(self, name, capability):
        from recoup.tensorcore.gpu import constants_of
        from recoup.tensorcore.gpu_kernels import product_kernel

        unit = UNITS[name]
        made = self.code(product_kernel, capability, **constants_of(unit), BLOCK_M=32, BLOCK_N=64)
        assert made["cubin"]
        code = made["ptx"]
        # Conversions of integers below 2^24 or with a bit cleared, and promotion's sum, are all that is left of floats.
        assert not re.search(r"\.ftz|\.f64|fma\.|\.approx|div\.[a-z.]*f32", code)
        assert ("add.f32" in code or "add.rn.f32" in code) == (unit.promotion is not None)
        assert ("mul.f32" in code or "mul.rn.f32" in code) == (unit.output == "float16")

    @pytest.mark.parametrize("capability", [80, 90, 120])
    def test_operands_are_taken_apart_in_integers(self, capability):
        from recoup.tensorcore.gpu import format_of
        from recoup.tensorcore.gpu_kernels import prepare_kernel

        made = self.code(prepare_kernel, capability, **format_of(TensorCore.hopper_bf16().formats[0]), BLOCK=1024)
        assert made["cubin"]
        assert not re.search(r"\.f32|\.f64", made["ptx"])

    @pytest.mark.parametrize("ones", [("M", "BLOCK_M"), ("N",), ("K", "part"), ("M", "N", "K", "part", "BLOCK_M")])
    def test_sizes_of_one_compile(self, ones):
        """Triton makes constants of arguments that are 1."""
        from recoup.tensorcore.gpu import constants_of, format_of
        from recoup.tensorcore.gpu_kernels import prepare_kernel, product_kernel

        unit, blocks = TensorCore.hopper_f16(output="float16", promotion=32), {"BLOCK_M": 32, "BLOCK_N": 16}
        assert self.code(product_kernel, 90, **constants_of(unit), **{**blocks, **dict.fromkeys(ones, 1)})["cubin"]
        sizes = ("C", "size", "batch_stride", "k_stride", "stride")[: 2 * len(ones)]
        constants = {**format_of(unit.formats[0]), "BLOCK": 1, **dict.fromkeys(sizes, 1)}
        assert self.code(prepare_kernel, 90, **constants)["cubin"]
