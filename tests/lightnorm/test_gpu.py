"""The CUDA passes against the CPU's: under Triton's interpreter everywhere, and on a GPU where there is one.

The interpreter must be chosen before Triton is imported, so `TestInterpreter` (CPU tensors) runs in a process of its
own, and so does test_gpu_code.py (machine code for GPUs that are not here).
"""

import math
import os

import pytest
import torch

from recoup.errors import RecoupError
from recoup.formats import Float
from recoup.lightnorm import LightNorm, cpu, passes
from recoup.lightnorm.separate import SeparatePasses

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
FORMATS = {
    "none": None,
    "truncate": Float.parse("fp10_154"),
    "nearest, flush": Float.parse("fp10_154").replace(rounding="nearest"),
    "nearest, subnormals": Float.parse("e5m2").replace(overflow="saturate"),
    "zero, subnormals": Float.ieee(5, 4, rounding="zero", overflow="saturate"),
}
SHAPES = [(3, 3, 23), (1, 2, 1300), (2, 1, 1), (5, 2, 64)]
EDGES = [0.0, -0.0, 1e-40, 63488.0, 65000.0, -1e6, 2.0**-14, 2.0**-14 - 2.0**-30, 2.0**-16, math.nan, math.inf]


def drawn(seed, shape, dtype=torch.float32, edges=False):
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(shape, generator=generator, dtype=dtype) * 3 for _ in range(2))
    if edges:
        for v in (x, g):
            v.view(-1)[: len(EDGES)] = torch.tensor(EDGES, dtype=dtype)[: v.numel()]
    return x, g, *(torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(4))


def same(x, y):
    """Equal bits, signs of zeros included; NaN where NaN."""
    x, nan = x.cpu(), y.isnan()
    signs = torch.equal(x.signbit() | nan, y.signbit() | nan)
    return signs and torch.equal(x.isnan(), nan) and torch.equal(x.nan_to_num(), y.nan_to_num())


class Kernels:
    """What holds on every device: without any difference from cpu.py."""

    device: str

    @property
    def gpu(self):
        from recoup.lightnorm import gpu

        return gpu

    def given(self, *tensors):
        return [v.to(self.device) for v in tensors]

    def check_moments(self, x, chunks):
        found, expected = self.gpu.moments(*self.given(x), chunks), cpu.moments(x, chunks)
        # a pair is exact as a whole: how it is split depends on the order of additions
        assert same(found[0].sum(-1) + 0.0, expected[0].sum(-1) + 0.0)
        assert torch.equal(found[1].cpu(), expected[1])
        assert torch.equal(found[2].cpu(), expected[2])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("shape", [(3, 2, 23), (1, 2, 1300), (2, 1, 600)])
    def test_moments(self, shape, dtype):
        for chunks in (1, 7):
            self.check_moments(drawn(1, shape, dtype)[0], chunks)

    def test_moments_of_several_pieces(self, monkeypatch):
        monkeypatch.setattr(self.gpu, "STEPS", 2)
        monkeypatch.setattr(self.gpu, "LANES", 16)
        x, g, *_ = drawn(1, (3, 2, 67))
        for chunks in (1, 3):
            self.check_moments(x, chunks)
            self.check_moments(x.sign(), chunks)  # ties within lanes, between lanes and between pieces
        found, expected = self.gpu.products(*self.given(x, g)), cpu.products(x, g)
        assert all(torch.equal(f.cpu().sum(-1), e.sum(-1)) for f, e in zip(found, expected, strict=True))

    def test_moments_of_ties_zeros_and_nan(self):
        x = torch.zeros(2, 4, 40)
        x[0, 0, ::2] = -0.0
        x[:, 1] = -7.5
        x[:, 2] = math.nan
        x[1, 3, 5:9] = torch.tensor([3.0, -3.0, 3.0, -3.0])
        for chunks in (1, 5):
            self.check_moments(x, chunks)

    def test_sums_that_cancel(self):
        x = drawn(2, (2, 3, 100), torch.float64)[0]
        x = x.round()
        x[0, :, :50], x[1, :, 50:] = 2.0**60, -(2.0**60)
        self.check_moments(x, 3)
        exact = [math.fsum(x[:, c].flatten().tolist()) for c in range(3)]
        assert self.gpu.moments(*self.given(x), 3)[0].sum(-1).tolist() == exact

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_products(self, dtype):
        for shape in SHAPES:
            x, g, *_ = drawn(3, shape, dtype)
            found, expected = self.gpu.products(*self.given(g, x)), cpu.products(g, x)
            assert all(torch.equal(f.cpu().sum(-1), e.sum(-1)) for f, e in zip(found, expected, strict=True))

    @pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # the interpreter's NumPy
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", FORMATS)
    def test_normalize_and_gradient(self, name, dtype):
        for shape in SHAPES:
            x, g, *vectors = drawn(4, shape, dtype, edges=True)
            found = self.gpu.normalize(*self.given(x, *vectors), FORMATS[name])
            expected = cpu.normalize(x, *vectors, FORMATS[name])
            assert all(same(f, e) for f, e in zip(found, expected, strict=True))
            chunks = max(1, min(8, shape[0] * shape[2] // 2))
            indices = cpu.moments(x.nan_to_num(0.0, 9e5), chunks)[2]
            amounts = vectors[2][:, None] * torch.arange(1, chunks + 1)
            for several in ((amounts, indices), (amounts[:, :0], indices[:, :0])):
                found = self.gpu.gradient(*self.given(g, *vectors[:2], *several), FORMATS[name])
                assert same(found, cpu.gradient(g, *vectors[:2], *several, FORMATS[name]))

    def test_finite(self):
        for dtype in (torch.float32, torch.float64):
            x = drawn(5, (2, 3, 700), dtype)[0]
            x[0, 0, 0] = torch.finfo(dtype).max
            assert self.gpu.finite(*self.given(x))
            for value in (math.nan, math.inf, -math.inf):
                y = x.clone()
                y[1, 2, 699] = value
                assert not self.gpu.finite(*self.given(y))

    @pytest.mark.parametrize(
        "config",
        [
            LightNorm(),
            LightNorm.range(chunks=1),
            LightNorm(Float.parse("bfloat16"), Float.parse("e5m2"), None, 3, 5),
            LightNorm(axis="place"),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("bad", [False, True])
    def test_forward_and_backward(self, config, bad, monkeypatch):
        x, grad, *vectors = drawn(6, (3, 5, 29))
        gamma, beta = (v.float() for v in vectors[:2])
        x[:, 1] = 3.0
        if bad:
            x[1, 2, 3], grad[0, 4, 7] = math.nan, math.inf
        expected = passes.forward(x, gamma, beta, config, 1e-5)
        slopes = passes.backward(grad, expected[1], expected[4], gamma, expected[5], config)
        # the interpreter's tensors are on the CPU
        monkeypatch.setattr(passes, "passes_for", lambda *_: iter([SeparatePasses(self.gpu, config)]))
        x, grad, gamma, beta = self.given(x, grad, gamma, beta)
        found = passes.forward(x, gamma, beta, config, 1e-5)
        assert all(same(f, e) for f, e in zip(found, expected, strict=True))
        again = passes.backward(grad, found[1], found[4], gamma, found[5], config)
        assert all(same(f, e) for f, e in zip(again, slopes, strict=True))

    def test_no_samples(self):
        x, g, *vectors = (v.to(self.device) for v in drawn(7, (0, 3, 20)))
        assert all(v.shape == x.shape for v in self.gpu.normalize(x, *vectors, None))
        assert all(torch.equal(v.cpu(), torch.zeros(3, 2, dtype=torch.float64)) for v in self.gpu.products(g, x))

    def test_too_many_pieces(self):
        with pytest.raises(RecoupError, match="fewer chunks"):
            self.gpu.moments(torch.zeros(1, 1, 1 << 17, device=self.device), 1 << 16)


class TestInterpreter(Kernels):
    __test__ = INTERPRETER
    device = "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: interpreter and compiler only")
class TestCuda(Kernels):
    __test__ = not INTERPRETER
    device = "cuda"
