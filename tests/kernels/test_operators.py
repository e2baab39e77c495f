"""Operators registered for these tests, and what asks for devices, Triton and names."""

import importlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from recoup.errors import RecoupError
from recoup.kernels import operators
from recoup.kernels.operators import check_capability, has_triton, named, needs_triton, on_device, register


def _scaled(x: Tensor, by: float) -> Tensor:
    return x * by


def _context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.by = inputs[1]


def _like(x: Tensor, _: Any) -> Tensor:
    return torch.empty_like(x)


def _batched(_: Any, dims: tuple, x: Tensor, add: float | None) -> tuple[Tensor, int]:
    return doubled(x, add), dims[0]


scaled = register(
    "test_scaled",
    _scaled,
    _like,
    backward=lambda ctx, grad: (grad * ctx.by, None),
    context=_context,
    autocast=True,
)
doubled = register(
    "test_doubled",
    {"CPU": lambda x, add: x * 2 + (add or 0)},
    _like,
    schema="(Tensor x, float? add) -> Tensor",
    vmap=_batched,
    waits=False,
)


def test_an_operator_passes_torchs_own_checks():
    torch.library.opcheck(torch.ops.recoup.test_scaled, (torch.randn(3, requires_grad=True), 3.0))
    torch.library.opcheck(torch.ops.recoup.test_doubled, (torch.randn(3), None))
    assert scaled(torch.ones(2), 3.0).tolist() == [3.0, 3.0]


def test_gradient_autocast_and_vmap():
    x = torch.ones(2, requires_grad=True)
    scaled(x, 3.0).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 3.0]
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled(torch.ones(2, dtype=torch.bfloat16), 3.0).dtype == torch.float32
    assert torch.vmap(lambda row: doubled(row, 1.0))(torch.ones(2, 3)).tolist() == [[3.0] * 3] * 2


def test_traced_by_the_fake():
    y = torch.compile(lambda x: scaled(x, 2.0) + 1, fullgraph=True, backend="aot_eager")(torch.ones(2))
    assert y.tolist() == [3.0, 3.0]
    assert scaled(torch.ones(2, device="meta"), 2.0).is_meta


def test_operators_that_look_at_values_stay_out_of_cuda_graphs():
    unsafe = torch.Tag.cudagraph_unsafe
    assert unsafe in torch.ops.recoup.test_scaled.default.tags
    assert unsafe not in torch.ops.recoup.test_doubled.default.tags


def test_errors_name_the_layer_and_the_shape():
    with pytest.raises(RecoupError, match=r"^layer 'a': odd$"), named("layer 'a'"):
        raise RecoupError("odd")
    with pytest.raises(RecoupError, match=r"^layer 'a', given \[2, 3\]: odd$"), named("layer 'a'", torch.ones(2, 3)):
        raise RecoupError("odd")
    with pytest.raises(KeyError, match=r"^'odd'$"), named("layer 'a'"):
        raise KeyError("odd")


def test_the_device_chooses_the_kernels():
    assert [on_device(torch.device(d), "LBA", lambda: "cpu", lambda: "cuda") for d in ("cpu", "cuda:1")] == [
        "cpu",
        "cuda",
    ]
    with pytest.raises(RecoupError, match=r"^LBA runs on the CPU and CUDA; got meta$"):
        on_device(torch.device("meta"), "LBA", lambda: "cpu", lambda: "cuda")


def test_without_triton_the_error_says_who_needs_it_and_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    told = r"^on CUDA, LBA needs Triton \(.*triton.*\): pip install 'recoup\[gpu\]', or move the model to the CPU$"
    with pytest.raises(RecoupError, match=told), needs_triton("LBA needs"):
        importlib.import_module("triton")
    odd = needs_triton("LBA and {braces}", "{who} miss {error}")
    with pytest.raises(RecoupError, match=r"^LBA and \{braces\} miss .*triton"), odd:
        importlib.import_module("triton")
    with pytest.raises(ValueError, match=r"^other$"), needs_triton("LBA needs"):
        raise ValueError("other")


def test_asking_for_triton_does_not_import_it():
    code = (
        "import importlib.util, sys\n"
        "from recoup.kernels.operators import has_triton\n"
        "assert has_triton() == (importlib.util.find_spec('triton') is not None)\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert isinstance(has_triton(), bool)


def test_old_gpus_are_refused(monkeypatch):
    x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))
    monkeypatch.setattr(operators, "capability", lambda _: (7, 5))
    with pytest.raises(RecoupError, match=r"^LBA's kernels need compute capability 8\.0 or later; cuda:0 has 7\.5$"):
        check_capability(x, "LBA's")
    check_capability(torch.ones(1), "LBA's")  # the interpreter's
    monkeypatch.setattr(operators, "capability", lambda _: (8, 0))
    check_capability(x, "LBA's")


def test_operators_may_be_left_out_where_nobody_listens():
    x, kept = torch.ones(2, 2), torch.ones(2, 2, requires_grad=True)
    assert operators.eager(x, x)
    assert not operators.eager(x, kept)
    with torch.no_grad():
        assert operators.eager(x, kept)
        assert operators.eager(x, torch.nn.Parameter(x))
    with torch.inference_mode():
        assert operators.eager(x, torch.ones(2, 2))
    negated = torch.complex(x, x).conj().imag  # its sign is a flag of the view
    assert negated.is_neg()
    for other in (x.to("meta"), negated, x.to_sparse(), "x", torch.nn.Buffer(x).as_subclass(Other)):
        assert not operators.eager(x, other)  # type: ignore[arg-type]
    for listening in (
        torch.autocast("cpu"),
        FakeTensorMode(),
        torch.device("meta"),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        torch.autograd.forward_ad.dual_level(),
    ):
        with listening:
            assert not operators.eager(x, x)
    seen = []
    torch.vmap(lambda v: seen.append(operators.eager(v, x)) or v)(x)
    assert seen == [False]
    if torch.set_flush_denormal(True):
        try:
            assert not operators.eager(x, x)
        finally:
            torch.set_flush_denormal(False)
    assert operators.eager(x, x)


class Other(Tensor):
    """A subclass, which may do anything."""
