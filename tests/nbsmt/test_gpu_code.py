"""The CUDA kernels through Triton's compiler, for GPUs that are not here. test_gpu.py runs this in its own process.

What exactness rests on is in the machine code, and nothing that would break it.
"""

import os
import re

import pytest

from recoup.nbsmt.config import NBSMT
from recoup.nbsmt.gpu_plan import Columns, tables


class TestCompiler:
    __test__ = os.environ.get("RECOUP_TEST_COMPILER") == "1"

    INEXACT = r"div\.(full|approx)|rcp\.|\.ftz|fma\.rn\.f32"

    def code(self, kernel, capability, constants, **options):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        pointers = {
            "operand_OLK": "*i8",
            "operand_PK": "*i8",
            "weight_OLK": "*i8",
            "offset_O": "*i32",
            "faults": "*i32",
        }
        floats = {
            "weight": "*fp32",
            "x": "*fp32",
            "scale_O": "*fp32",
            "out_MO": "*fp32",
            "scale": "fp32",
            "order": "*i64",
        }
        types = {**pointers, **floats, **dict.fromkeys(constants, "constexpr")}
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        aligned = [i for i, name in enumerate(signature) if types.get(name, "*")[0] == "*"]
        source = ASTSource(
            kernel,
            signature,
            {(kernel.arg_names.index(name),): value for name, value in constants.items()},
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        options = {"enable_fp_fusion": False, **options}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]

    @pytest.mark.parametrize(
        ("config", "capability", "zero"),
        [(NBSMT(2), 80, 0), (NBSMT(4, "S+Aw", "half_up", "adjacent"), 90, 0), (NBSMT(2, "S"), 90, 128)],
    )
    def test_operands_divide_truly(self, config, capability, zero):
        from recoup.nbsmt import gpu_operands as kernels

        columns = Columns(config, 64)
        blocks = {"BLOCK_S": 32, "BLOCK_P": 64}
        for_x = {**columns.constants(tables(config)[0], True), **columns.port(zero), **blocks}
        for_w = {**columns.constants(tables(config)[1], False), "LESS": 128 - zero, "BLOCK": 512}
        for kernel, constants in ((kernels._activation_kernel, for_x), (kernels._weight_kernel, for_w)):
            code = self.code(kernel, capability, constants)
            assert "div.rn.f32" in code
            assert not re.search(self.INEXACT, code)

    @pytest.mark.parametrize(
        ("capability", "block", "product_"),
        [
            (80, (64, 16, 32, 4, 3), "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
            (90, (128, 128, 128, 8, 3), "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"),
        ],
    )
    def test_convolutions_use_the_matrix_unit(self, capability, block, product_):
        from recoup.nbsmt.gpu_convolution import Tile, _convolution_kernel

        t = Tile(*block)
        blocks = {"BLOCK_M": t.pixels, "BLOCK_O": t.outputs, "BLOCK_K": t.columns}
        constants = {"EVEN": capability == 80, "BITS": 18, **blocks}
        code = self.code(_convolution_kernel, capability, constants, num_warps=t.warps, num_stages=t.stages)
        assert product_ in code
        assert "cvt.rn.f32.s32" in code

    def test_convolutions_in_groups(self):
        from recoup.nbsmt.gpu_convolution import _grouped_kernel

        code = self.code(_grouped_kernel, 80, {"BITS": 32, "BLOCK_M": 64, "BLOCK_O": 32})
        assert "cvt.rn.f32.s32" in code

    @pytest.mark.parametrize(("bits", "grouped"), [(18, False), (18, True), (32, False)])
    def test_registers_that_saturate(self, bits, grouped):
        from recoup.nbsmt.gpu_convolution import _saturating_kernel

        blocks = {"BLOCK_M": 32, "BLOCK_O": 32}
        code = self.code(_saturating_kernel, 90, {"LESS": 128, "BITS": bits, "GROUPED": grouped, **blocks})
        assert "min.s32" in code or bits > 30
        assert "cvt.rn.f32.s" in code or "cvt.f32.s" in code
