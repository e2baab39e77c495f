"""The CUDA kernels: under Triton's interpreter everywhere, and on a GPU where there is one.

The interpreter must be chosen before Triton is imported, so `TestInterpreter` (CPU tensors) runs in a process of its
own, and so does test_gpu_code.py (machine code for GPUs that are not here).
"""

import os

import pytest
import torch

import recoup as rc
from recoup.errors import RecoupError
from recoup.formats import Float, Int
from recoup.lba import FP8, LBA, cpu, driver, quantize_operand, reference
from recoup.lba.config import GRADIENTS
from recoup.network.convolution import Geometry
from recoup.network.emulated import emulated_layers
from tests.networks import batches_of, small_net

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
STOCHASTIC = Float.lba(3, 6, bias=4, rounding="stochastic")
UNITS = {
    "m7e4": LBA(),
    "m7e4, no underflow": LBA(underflow=False),
    "m4e3": LBA.biased(4, 3),
    "m10e5, no chunks": LBA.m10e5(chunk=None),
    "fused": LBA(product=None, chunk=3),
    "fp32": LBA.fp32(),
    "sequential14": LBA.sequential14(chunk=5),
    "bfloat16, subnormals": LBA(Float.parse("e5m2"), Float.parse("bfloat16"), 4),
    "stochastic": LBA(STOCHASTIC, STOCHASTIC, 7),
    "int16": LBA.int16(),
    "int12 wraps, scaled": LBA(None, Int(12, overflow="wrap"), 16, scale=2.0**-4),
    "int12, promoted": LBA(None, Int(12), 4, scale=2.0**-4, promotion=Float.parse("float32")),
}


def gaussian(seed, *shapes, whole=False):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(x * 3).round() if whole else x for x in drawn]


class Kernels:
    """What holds on every device: the kernels against the reference, without any difference."""

    device: str

    def gpu(self, **options):
        from recoup.lba.gpu import Gpu

        return Gpu(**options)

    def product(self, a, b, config, seed=3, **options):
        return driver.matmul(self.gpu(**options), a.to(self.device), b.to(self.device), config, seed).cpu()

    @pytest.mark.parametrize("unit", UNITS)
    def test_products_equal_the_reference(self, unit):
        config = UNITS[unit]
        whole = isinstance(config.accumulator, Int) and config.scale == 1
        a, b = gaussian(1, (2, 3, 21), (2, 21, 17), whole=whole)
        for scale in (1.0,) if whole else (2.0**-6, 2.0**3):
            expected = [reference.matmul(a[i] * scale, b[i], config, 3, i * 3 * 17) for i in range(2)]
            assert torch.equal(self.product(a * scale, b, config), torch.stack(expected))

    @pytest.mark.parametrize("unit", ["m7e4", "fused", "stochastic"])
    def test_values_at_the_edges(self, unit):
        config = UNITS[unit]
        a, b = gaussian(2, (1, 6, 40), (1, 40, 17))
        low = config.accumulator.smallest_normal
        edges = torch.tensor([0.0, -0.0, low, low * (1 - 2**-24), config.accumulator.largest_value, 3e37, 1e-40, -1e30])
        for x in (a, b):
            x.view(-1)[: 8 * 8 : 8] = edges
        expected = reference.matmul(a[0], b[0], config, 3)[None]
        assert torch.equal(self.product(a, b, config), expected)
        a, b = quantize_operand(a.clamp(-9, 9), FP8)[0], quantize_operand(b.clamp(-9, 9), FP8)[0]
        assert torch.equal(self.product(a, b, config), reference.matmul(a[0], b[0], config, 3)[None])

    @pytest.mark.parametrize("bits", [8, 32])
    def test_products_far_beyond_an_integer_that_wraps(self, bits):
        config = LBA(None, Int(bits, overflow="wrap"), 16, scale=2.0**-4)
        a, b = gaussian(8, (1, 3, 21), (1, 21, 17))
        for scale in (2.0**20, 2.0**30, 2.0**60):
            expected = reference.matmul(a[0] * scale, b[0] * 2.0**20, config)[None]
            assert torch.equal(self.product(a * scale, b * 2.0**20, config), expected)

    def test_every_tile_and_shape_gives_the_same_bits(self):
        for M, K, N in ((1, 1, 1), (1, 37, 33), (33, 3, 2), (17, 5, 65)):
            a, b = gaussian(M + N, (1, M, K), (1, K, N))
            expected = driver.matmul(cpu.Cpu(), a, b, LBA())
            for block in ((32, 64), (16, 16)):
                assert torch.equal(self.product(a, b, LBA(), block=block), expected)

    def test_any_strides(self):
        a, b = gaussian(5, (3, 12, 10), (3, 8, 12))
        pairs = [(a.mT, b.mT), (a[:, ::2, 1:9], b[:, :, ::2]), (a[:1].expand(3, -1, -1).mT, b.mT)]
        for x, w in pairs:
            assert torch.equal(self.product(x, w, LBA()), driver.matmul(cpu.Cpu(), x, w, LBA()))

    @pytest.mark.parametrize(
        "geometry",
        [
            Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1),
            Geometry((3, 2), (2, 1), (1, 0), (1, 2), 2),
            Geometry((1, 1), (2, 2), (0, 0), (1, 1), 1),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("unit", ["m7e4", "stochastic"])
    def test_convolutions_equal_the_cpu(self, geometry, unit, monkeypatch):
        monkeypatch.setattr(driver, "IMAGE_BYTES", 600)
        config = UNITS[unit].replace(gradient="recursive_of")
        x, weight = gaussian(6, (2, 4, 5, 6), (4, 4 // geometry.groups, *geometry.kernel))
        grad = torch.ones(2, 4, *geometry.size(x))
        x, weight = x.relu() * 4, weight.sign()  # sums of whole numbers: gradients are exact
        y = driver.convolution(self.gpu(), x.to(self.device), weight.to(self.device), geometry, config, 5)
        assert torch.equal(y.cpu(), driver.convolution(cpu.Cpu(), x, weight, geometry, config, 5))
        x = x.round()
        given = [v.to(self.device) for v in (grad, x, weight)]
        found = driver.convolution_gradients(self.gpu(), *given, geometry, config, 5)
        expected = driver.convolution_gradients(cpu.Cpu(), grad, x, weight, geometry, config, 5)
        assert all(torch.equal(f.cpu(), e) for f, e in zip(found, expected, strict=True))

    def check_gradients(self, config, **options):
        a, b, grad = gaussian(7, (2, 5, 21), (2, 21, 18), (2, 5, 18), whole=True)
        a = a / 2
        given = [v.to(self.device) for v in (a, b, grad)]
        found_a, found_b = driver.gradients(self.gpu(**options), *given, config, 3)
        for i in range(2):
            expected_a, expected_b = reference.gradients(a[i], b[i], grad[i], config, 3, i * 5 * 18)
            assert torch.equal(found_a[i].cpu(), expected_a.float())
            assert torch.equal(found_b[i].cpu(), expected_b.float())

    @pytest.mark.parametrize("gradient", GRADIENTS[1:])
    @pytest.mark.parametrize("unit", ["m4e3", "fused", "stochastic", "int12, promoted"])
    def test_gradients_equal_the_reference(self, gradient, unit):
        self.check_gradients(UNITS[unit].replace(gradient=gradient))

    def test_gradients_of_any_strides(self):
        """b transposed, cut out and expanded: addresses keep the strides and the offset of its storage."""
        config = LBA.biased(4, 3, gradient="recursive_of")
        (a, grad) = gaussian(7, (2, 5, 12), (2, 5, 18), whole=True)
        (long, wide, one) = gaussian(8, (2, 18, 12), (3, 14, 40), (1, 18, 12), whole=True)
        for b in (long.mT, wide[1:, 2:, 1:37:2], one.expand(2, -1, -1).mT):
            given = [a.to(self.device), b.to(self.device), grad.to(self.device)]
            found = driver.gradients(self.gpu(), *given, config)
            expected = [reference.gradients(a[i], b[i], grad[i], config) for i in range(2)]
            for side in (0, 1):
                assert torch.equal(found[side].cpu(), torch.stack([pair[side] for pair in expected]).float())

    def test_gradients_by_parts(self, monkeypatch):
        from recoup.lba import gpu

        monkeypatch.setattr(gpu, "FLAG_BYTES", 2 * 2 * 21 * 18)
        self.check_gradients(LBA.biased(4, 3, gradient="recursive_of"), block=(16, 16))

    def test_what_is_not_finite_is_named(self):
        a, b = gaussian(8, (1, 2, 4), (1, 4, 3))
        a[0, 1, 2] = torch.nan
        with pytest.raises(RecoupError, match=r"operand a \[1, 2, 4\] holds 1 NaN or infinite values"):
            self.product(a, b, LBA())
        y = self.product(a, b, LBA(nonfinite="propagate"))
        assert y[0, 1].isnan().all()
        assert torch.equal(y[0, 0], reference.matmul(a[0, :1], b[0], LBA())[0])


class TestInterpreter(Kernels):
    __test__ = INTERPRETER
    device = "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: interpreter and compiler only")
class TestCuda(Kernels):
    __test__ = not INTERPRETER
    device = "cuda"

    def test_assembly_and_float64_agree(self):
        a, b = gaussian(9, (2, 100, 300), (2, 300, 90))
        for unit in ("m7e4", "m7e4, no underflow", "fused", "m4e3"):
            together = [self.product(a, b, UNITS[unit], assembly=assembly) for assembly in (True, False)]
            assert torch.equal(*together)
            assert torch.equal(together[0], driver.matmul(cpu.Cpu(), a, b, UNITS[unit], 3))

    def test_layers_of_a_network_equal_the_cpu(self):
        torch.manual_seed(0)
        model, x = rc.models.resnet20().eval(), torch.rand(2, 3, 32, 32)
        rc.emulate_(model, LBA())
        with torch.inference_mode():
            expected = model.conv1(x)
            assert torch.equal(model.to("cuda").conv1(x.cuda()).cpu(), expected)

    def test_repairs_and_profiles_equal_the_cpus(self):
        gains, rows = [], []
        for device in ("cpu", "cuda"):
            model = rc.emulate_(small_net(), LBA.biased(4, 4)).to(device)
            batches = batches_of(2, 4)
            rc.lba.correct_gain_(model, batches)
            gains.append(torch.cat([layer.gain.cpu() for layer in emulated_layers(model).values()]))
            rows.append(rc.lba.profile(model.stem, [batches[0]], outputs=64))
        torch.testing.assert_close(*gains, rtol=2e-3, atol=0)  # cuDNN's convolutions may be TF32: 10 bits
        assert rows[0] == rows[1]
