"""Kernels write by bare addresses, so memory is of the dtype that they are made for, whatever torch's default is."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import recoup as rc

SRC = Path(__file__).parents[2] / "src" / "recoup"
ROOMS = ("formats", "gates", "kernels", "lba", "lightnorm", "nbsmt", "silicon", "tensorcore")
MADE = {"zeros", "ones", "empty", "full", "rand", "randn", "linspace", "eye", "empty_strided"}
LAYERS = [
    rc.NBSMT(),
    rc.NBSMT(threads=2),
    rc.NBSMT(threads=4),
    rc.NBSMT(1, accumulator=rc.Int(12)),
    rc.NBSMT(1, accumulator=rc.Int(18)),
    rc.NBSMT(2, accumulator=rc.Int(16)),
    *(rc.LBA(gradient=kind) for kind in ("identity", "recursive_of", "recursive_diff", "immediate_of")),
    rc.LBA.m10e5(),
    rc.TensorCore.hopper_fp8(),
    rc.TensorCore.hopper_bf16(),
    rc.TensorCore.ampere_tf32(),
    rc.TensorCore.blackwell_mxfp8(),
    rc.TensorCore.blackwell_nvfp4(),
]


def _unsaid(path):
    """Calls that make a tensor of torch's default dtype."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MADE:
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and not any(keyword.arg in ("dtype", None) for keyword in node.keywords):
                yield f"{path.relative_to(SRC)}:{node.lineno}: {ast.unparse(node)}"


def test_rooms_of_kernels_say_the_dtype_of_what_they_make():
    found = [line for room in ROOMS for path in sorted((SRC / room).rglob("*.py")) for line in _unsaid(path)]
    assert [line for line in found if not line.startswith("nbsmt/cost.py")] == []  # an example for the user's network


@contextmanager
def _default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _run(config, signed):
    """Outputs and gradients of a convolution and a linear layer that were never run before."""
    random = torch.Generator().manual_seed(0)
    kind = {"generator": random, "dtype": torch.float32}
    net = nn.Sequential(nn.Conv2d(32, 33, 3, padding=1), nn.Flatten(), nn.Linear(33 * 36, 32)).to(torch.float32)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, **kind) / 8)
    x = torch.randn(3, 32, 6, 6, **kind)
    x = (x if signed else x.relu()).requires_grad_()
    for layer in (net[0], net[2]):
        layer.activation_scale, layer.activation_zero = 0.03125, 128 if signed else 0
    net[2].activation_zero = 128
    rc.emulate_(net, config)
    y = net(x)
    y.backward(torch.ones(y.shape, dtype=torch.float32))
    return [y.detach(), x.grad, *(parameter.grad for parameter in net.parameters())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", LAYERS, ids=repr)
def test_layers_do_not_depend_on_the_default(config, dtype):
    signed = not isinstance(config, rc.NBSMT) or config.threads == 1
    expected = _run(config, signed)
    with _default(dtype):
        got = _run(config, signed)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_self_tests_do_not_depend_on_the_default(dtype):
    with _default(dtype):
        for card in rc.wings.cards().values():
            if card.self_test is not None:
                card.self_test()
