"""What the CUDA path decides and refuses before anything is launched; no GPU and no Triton needed."""

import sys
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recoup.errors import RecoupError
from recoup.formats import Int
from recoup.kernels import operators
from recoup.nbsmt import gpu
from recoup.nbsmt.config import NBSMT, POLICIES, THREADS
from recoup.nbsmt.gpu_plan import Plan
from recoup.nbsmt.weights import weight_operand
from recoup.network.convolution import POINTWISE, Geometry


def test_no_sum_exceeds_the_planned_most():
    generator, tall = torch.Generator().manual_seed(0), Geometry((2, 1), (1, 1), (0, 0), (1, 1), 1)
    for config in (NBSMT(*fields) for fields in product(THREADS, POLICIES)):
        code = torch.randint(-128, 128, (20, 12, 2, 1), generator=generator).to(torch.int8)
        code[:5] = torch.tensor([-128, 127, -9, 8, 1], dtype=torch.int8).view(5, 1, 1, 1)
        code[torch.rand(code.shape, generator=generator) < 0.2] = 0
        operand = weight_operand(code, config)
        most = Plan.of((1, 12, 2, 1), (20, 12, 2, 1), config, tall).most
        assert most >= operand.bound
        assert most >= 128 * operand.weight_OGJkk.int().abs().flatten(1).sum(1).max()


def test_sums_beyond_32_bits_are_refused():
    many = torch.ones(1, 70000, 1, 1)
    with pytest.raises(RecoupError, match=r"layer: .*32-bit accumulator"):
        gpu._check_sums(many, torch.zeros(1, 1, 1, dtype=torch.int8), NBSMT(1), "layer")
    with pytest.raises(RecoupError, match="run this layer on the CPU"):
        gpu._check_sums(many[:, :9], torch.full((1, 1, 1 << 17), -128, dtype=torch.int8), NBSMT(1), "layer")
    gpu._check_sums(many[:, :9], torch.full((1, 1, (1 << 17) - 1), -128, dtype=torch.int8), NBSMT(1), "layer")


def test_a_register_of_32_bits_is_refused_as_on_the_cpu(monkeypatch):
    """Under Int(32) nothing ever saturates; a narrower one takes any layer."""
    weight = torch.ones(1, 70000, 1, 1)
    none = torch.zeros(1, 1, 1, dtype=torch.int8)
    gpu._check_sums(weight, none, NBSMT(1, accumulator=Int(31)), "layer")
    operands = SimpleNamespace(weight_operands=lambda *_: (none, None, None))
    monkeypatch.setattr(gpu, "_kernels", lambda _: (operands, None))
    monkeypatch.setattr(gpu, "_check_device", lambda *_: None)
    with pytest.raises(RecoupError, match=r"layer: .*32-bit accumulator"):
        gpu.accumulate(weight, weight, None, 1.0, NBSMT(1, accumulator=Int(32)), POINTWISE, "layer")


@pytest.mark.parametrize(
    ("weight", "order", "groups", "message"),
    [
        ((2, 5, 1, 1), None, 1, "does not fit the input"),
        ((3, 2, 1, 1), None, 2, "does not fit the input"),
        ((2, 2, 1, 1), None, 2, "runs one thread"),
        ((2, 4, 1, 1), 3, 1, r"order has shape \[3\]"),
        ((2, 4, 5, 1), None, 1, "larger than the padded input"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(weight, order, groups, message):
    plan = Plan.of((1, 4, 3, 3), weight, NBSMT(), Geometry(weight[2:], (1, 1), (0, 0), (1, 1), groups))
    with pytest.raises(RecoupError, match=message):
        gpu._check_sizes(plan, None if order is None else torch.arange(order), "layer")


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    for name in ("gpu_operands", "gpu_convolution"):
        monkeypatch.delitem(sys.modules, f"recoup.nbsmt.{name}", raising=False)
        monkeypatch.delattr(f"recoup.nbsmt.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RecoupError, match=r"layer 'a': .*recoup\[gpu\]"):
        gpu.accumulate(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1), None, 1.0, NBSMT(), POINTWISE, "layer 'a'")


def test_devices_that_cannot_run_the_kernels_are_refused(monkeypatch):
    x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))
    with pytest.raises(RecoupError, match="the input lies on cuda:0, the weight on cpu"):
        gpu._check_device(x, torch.zeros(1), None, "layer")
    monkeypatch.setattr(operators, "capability", lambda _: (7, 5))
    with pytest.raises(RecoupError, match=r"need compute capability 8\.0 or later; cuda:0 has 7\.5"):
        gpu._check_device(x, x, None, "layer")
    monkeypatch.setattr(operators, "capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RecoupError, match="CUDA graph"):
        gpu._check_device(x, x, None, "layer")
