"""The CUDA kernels: under Triton's interpreter everywhere, and on a GPU where there is one.

The interpreter must be chosen before Triton is imported, so `TestInterpreter` (CPU tensors) runs in a process of its
own, and so does test_gpu_code.py (machine code for GPUs that are not here).
"""

import math
import os
import random

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.errors import RecoupError
from recoup.tensorcore import TensorCore, TensorCoreConv2d, TensorCoreLinear, cpu, matmul, ops, reference
from recoup.tensorcore.config import LANE_BITS, OPERANDS, OUTPUTS
from tests.tensorcore.strategies import KINDS, PLAIN, operands, same

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
HOPPER = TensorCore.hopper_fp8()


def drawn_unit(draw):
    """Any unit that is legal."""
    group, output = draw.randint(1, 64), draw.choice(OUTPUTS)
    most = LANE_BITS - math.ceil(math.log2(4 * group + 2))
    pair, promotion = (draw.choice(OPERANDS), draw.choice(OPERANDS)), draw.choice((None, group, 2 * group))
    return TensorCore(pair, group, draw.randint(1, min(35, most)), output, promotion)


class Kernels:
    """What holds on every device: the kernels against the reference, without any difference."""

    device: str

    def products(self, a, b, unit, **options):
        from recoup.tensorcore import gpu

        y, faults = gpu.products(a.to(self.device), b.to(self.device), unit, **options)
        assert faults == 0
        return y.cpu()

    def check(self, unit, shape, kind, seed):
        a, b = operands(unit, shape, kind, seed)
        assert same(self.products(a[None], b[None], unit)[0], reference.matmul(a, b, unit)), (unit, kind, seed)

    @pytest.mark.parametrize("preset", PLAIN)
    def test_presets_equal_the_reference(self, preset):
        unit = PLAIN[preset]
        for seed, kind in enumerate(KINDS):
            self.check(unit, (3, 2 * unit.group + 1, 5), kind, seed)

    @pytest.mark.parametrize("output", OUTPUTS)
    @pytest.mark.parametrize("preset", ["hopper-fp8", "hopper-f16", "ampere-bf16", "ampere-tf32"])
    def test_outputs_and_promotion_equal_the_reference(self, preset, output):
        unit = PLAIN[preset]
        for seed, kind in enumerate(KINDS):
            promotion = (unit.group, 2 * unit.group)[seed % 2]
            self.check(unit.replace(output=output, promotion=promotion), (2, 3 * unit.group - 1, 4), kind, seed)
            self.check(unit.replace(output=output), (2, unit.group + 1, 4), kind, seed)

    @pytest.mark.parametrize("start", range(4))
    def test_any_unit_equals_the_reference(self, start):
        draw = random.Random(start)
        for seed in range(15):
            self.check(drawn_unit(draw), (2, draw.randint(1, 70), 3), draw.choice(KINDS), seed)

    def test_long_sums_overflow_where_the_unit_does(self):
        unit = TensorCore.ampere_bf16()
        a = torch.tensor([[2.0**100] * 40, [-(2.0**100)] * 40])
        b = torch.full((40, 2), 2.0**26)
        b[:, 1] = 2.0**-40
        got = self.products(a[None], b[None], unit)[0]
        assert same(got, reference.matmul(a, b, unit))
        assert got.isinf().tolist() == [[True, False], [True, False]]
        b[20:] *= -1  # an infinite accumulator stays
        for unit in (TensorCore.ampere_bf16(), TensorCore.ampere_bf16(output="float16", promotion=16)):
            assert same(self.products(a[None], b[None], unit)[0], reference.matmul(a, b, unit))

    def test_every_tile_and_shape_gives_the_same_bits(self):
        for M, K, N in ((1, 1, 1), (1, 37, 33), (33, 3, 2), (17, 5, 65)):
            a, b = operands(HOPPER, (M, K, N), "normal", M)
            expected = cpu.products(a, b, HOPPER)[0]
            for block in ((32, 64), (16, 16)):
                assert same(self.products(a[None], b[None], HOPPER, block=block)[0], expected)

    def test_batches_of_any_strides(self):
        a, b = (
            torch.stack(x) for x in zip(*(operands(HOPPER, (8, 40, 12), "zeros", s) for s in range(3)), strict=True)
        )
        pairs = [(a, b), (b.mT, a.mT), (a[:, ::2, 1:9], b[:, 3:11, ::3]), (a[:1].expand(3, -1, -1), b)]
        for x, w in pairs:
            expected = [cpu.products(x[i], w[i], HOPPER)[0] for i in range(3)]
            assert same(self.products(x, w, HOPPER), torch.stack(expected))

    @pytest.mark.parametrize("name", OPERANDS)
    def test_faults_are_those_of_the_cpu(self, name):
        from recoup.tensorcore import gpu

        form, unit = rc.Float.parse(name), TensorCore(name, 8, 8, "float32")
        top, least = form.largest_value, 2.0 ** (form.min_exponent - form.mantissa)
        beyond = torch.tensor(top).nextafter(torch.tensor(math.inf)).item()
        for value in (top, -top, least, -0.0, 1 + 2.0**-form.mantissa):
            assert not self.faults(gpu, value, unit)
        wrong = (beyond, -beyond, 1 + 2.0 ** (-form.mantissa - 1), least / 2, 1.5 * least, math.inf, math.nan)
        for value in wrong:
            expected = cpu.products(torch.tensor([[value]]), torch.ones(1, 1), unit)[1]
            assert self.faults(gpu, value, unit) == expected
            assert expected or value == 0

    def faults(self, gpu, value, unit):
        b = torch.ones(1, 2, 3)
        b[0, 1, 2] = value
        return gpu.products(torch.ones(1, 2, 2, device=self.device), b.to(self.device), unit)[1]


# NumPy tells of inf - inf and of overflow, which promotion has as float32 has them.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in add:RuntimeWarning")
class TestInterpreter(Kernels):
    __test__ = INTERPRETER
    device = "cpu"

    @pytest.fixture(autouse=True)
    def _through_triton(self, monkeypatch):
        from recoup.tensorcore import gpu

        monkeypatch.setattr(ops, "_on_cpu", gpu.products)

    def test_what_is_not_finite_goes_the_units_way(self):
        unit = TensorCore.hopper_f16(nonfinite="propagate")
        special = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
        generator = torch.Generator().manual_seed(5)
        for seed in range(4):
            a, b = operands(unit, (4, 20, 4), "large" if seed % 2 else "zeros", seed)
            for x in (a, b):
                places = torch.rand(x.shape, generator=generator) < 0.04
                x[places] = special[torch.randint(4, (int(places.sum()),), generator=generator)]
            assert same(matmul(a, b, unit), reference.matmul(a, b, unit))

    @pytest.mark.parametrize(
        ("place", "value", "told"),
        [("a", 1.1, r"a holds 1\.10.*no value of e4m3fn"), ("b", math.nan, "b has 1 elements that are NaN")],
    )
    def test_faults_are_told_as_on_the_cpu(self, place, value, told):
        a, b = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
        (a if place == "a" else b)[1, 2, 3] = value
        with pytest.raises(RecoupError, match=told):
            matmul(a, b, HOPPER)

    def test_layers_and_gradients_equal_the_cpus(self, monkeypatch):
        unit = HOPPER.replace(backward="unit", promotion=32)
        torch.manual_seed(0)
        model = nn.Sequential(
            TensorCoreConv2d(3, 4, 3, groups=1, config=unit), nn.Flatten(), TensorCoreLinear(64, 3, config=unit)
        )
        x, found = torch.randn(2, 3, 6, 6), []
        for products in (ops._on_cpu, None):
            if products is None:
                monkeypatch.undo()
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            found.append([y.detach(), *(p.grad for p in model.parameters())])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: interpreter and compiler only")
class TestCuda(Kernels):
    __test__ = not INTERPRETER
    device = "cuda"

    def test_networks_equal_the_cpu(self):
        torch.manual_seed(0)
        model, x = rc.models.resnet20().eval(), torch.rand(2, 3, 32, 32)
        rc.emulate_(model, HOPPER)
        with torch.inference_mode():
            expected = model.conv1(x)
            assert torch.equal(model.to("cuda").conv1(x.cuda()).cpu(), expected)

    def test_faults_are_told(self):
        with pytest.raises(RecoupError, match=r"a holds 1\.10"):
            matmul(torch.full((2, 3), 1.1, device="cuda"), torch.ones(3, 2, device="cuda"), HOPPER)
