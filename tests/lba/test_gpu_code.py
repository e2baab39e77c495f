"""The CUDA kernels through Triton's compiler, for GPUs that are not here. test_gpu.py runs this in its own process.

What exactness rests on is in the machine code, and nothing that would break it.
"""

import itertools
import os
import re

import pytest
import torch

from recoup.formats import Float, Int
from recoup.lba import LBA
from recoup.lba.plan import Extent, plan

STOCHASTIC = Float.lba(3, 6, bias=4, rounding="stochastic")
CONFIGS = {
    "m7e4": LBA(),
    "fused": LBA(product=None),
    "fp32": LBA.fp32(),
    "stochastic": LBA(STOCHASTIC, STOCHASTIC, 7),
    "wrap": LBA(None, Int(12, overflow="wrap"), 16, scale=2.0**-4),
}


class TestCompiler:
    __test__ = os.environ.get("RECOUP_TEST_COMPILER") == "1"

    def code(self, kernel, capability, config, **constants):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from recoup.lba.gpu import OPTIONS, form_of

        one = Extent(1.0, 0, 0)
        chosen = plan(one, one, torch.inf, config, fma=True)
        form = {"FORM": form_of(chosen, True), "WIDE": chosen.form.wide, "RANDOM": chosen.form.random}
        constants = {**{k: v for k, v in form.items() if k in kernel.arg_names}, **constants}
        number, whole = ("*fp64", "*i64") if chosen.form.wide else ("*fp32", "*i32")
        types = {"y": number, "floats": number, "integers": whole, "terms": "*i64", "columns": "*i64"}
        types |= dict.fromkeys(("a", "b", "grad", "grad_a", "grad_b"), "*fp32")
        types |= {"flags": "*u8", "outer_flags": "*u8", "b_scale": "fp32", "b_least": "fp32", "seed_base": "i64"}
        types |= dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, places)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS).asm["ptx"]

    @pytest.mark.parametrize(
        ("config", "capability"),
        [*((config, 90) for config in CONFIGS), *itertools.product(("m7e4", "fp32"), (80, 120))],  # float32 and float64
    )
    def test_products_round_as_written(self, config, capability):
        from recoup.lba.gpu_kernels import product_kernel

        code = self.code(product_kernel, capability, CONFIGS[config], BLOCK_M=16, BLOCK_N=16)
        assert not re.search(r"fma\.rn\.f(32|64)|\.approx", code)
        if config in ("m7e4", "fused"):
            assert "fma.rz.ftz.f32" in code
            assert ("mul.rz.ftz.f32" in code) == (config == "m7e4")
            assert "f64" not in code
        else:
            assert "add.rn.f64" in code or "add.f64" in code
            assert ".rz" not in code

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("overflow", [False, True])
    def test_gradients_compile(self, config, overflow):
        from recoup.lba.gpu_kernels import back_kernel, steps_kernel

        blocks = {"BLOCK_M": 16, "BLOCK_N": 16}
        unit = CONFIGS[config]
        rounded = unit.product is not None
        assert self.code(steps_kernel, 90, unit, OVERFLOW=overflow, ROUNDED_PRODUCT=rounded, **blocks)
        assert self.code(back_kernel, 90, unit, RECURSIVE=overflow, **blocks)
