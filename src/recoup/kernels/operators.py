"""What every operator of the torch.library needs: one way to register it, its device's kernels, errors by layer.

A wing's operators run on the CPU and on CUDA, where their kernels are Triton's. Triton is imported when a CUDA tensor
arrives and not before, so that recoup installs and runs without it.
"""

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache, wraps
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

from recoup.errors import RecoupError
from recoup.kernels.subnormals import exactly, flushes

__all__ = ["CAPABILITY", "check_capability", "eager", "has_triton", "named", "needs_triton", "on_device", "register"]

KINDS = (Tensor, Parameter)
CAPABILITY = (8, 0)
"""The least compute capability: Triton supports no older GPUs."""

WITHOUT_TRITON = "on CUDA, {who} Triton ({error}): pip install 'recoup[gpu]', or move the model to the CPU"

Backend = TypeVar("Backend")


class _Library(torch.library.Library):
    """Operators whose derivatives are reverse ones: others are refused where torch would give zeros or an error that
    names nothing."""

    def impl(self, op_name: Any, fn: Callable, dispatch_key: str = "", **options: Any) -> None:
        if dispatch_key == "Autograd":
            fn = _reverse_only(op_name, fn)
        super().impl(op_name, fn, dispatch_key, **options)


def _reverse_only(name: str, kernel: Callable) -> Callable:
    def run(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(value) for value in args):
            raise RecoupError(_ONLY_REVERSE.format(name, "torch.func.jvp or torch.autograd.forward_ad"))
        try:
            return kernel(keyset, *args)
        except RuntimeError as error:
            if "setup_context" not in str(error):
                raise
            raise RecoupError(_ONLY_REVERSE.format(name, "torch.func.grad, vjp or jacrev")) from None

    return run


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


_ONLY_REVERSE = "recoup::{} cannot run inside {}: use torch.autograd.grad or .backward(); torch.vmap works"

# Registered by hand: torch.library.custom_op imports the compiler, 140 MB and seconds, at an operator's first call.
_library = _Library("recoup", "FRAGMENT")


def register(
    name: str,
    run: Callable | Mapping[str, Callable],
    fake: Callable,
    *,
    schema: str | None = None,
    backward: Callable | None = None,
    context: Callable | None = None,
    vmap: Callable | None = None,
    autocast: bool = False,
    waits: bool = True,
) -> Callable:
    """Define the operator ``recoup::name`` and return it. Its bits do not depend on `torch.set_flush_denormal`.

    Args:
        name: within the namespace ``recoup``.
        run: what computes it: one function that asks for the device itself, or one for each of torch's dispatch keys
            (``CPU``, ``CUDA``).
        fake: the results' shapes, dtypes and strides, for tracing.
        schema: arguments and results in torch's notation; None: those of run's annotations.
        backward, context: the gradient, as torch.library.register_autograd takes them; None: the operator has none.
        vmap: as torch.library.register_vmap takes it; None: the operator cannot be batched.
        autocast: whether autocast turns half precision operands into float32 rather than leaving them.
        waits: whether a call looks at the values of its operands. That waits for the GPU, which a CUDA graph cannot
            hold.
    """
    if schema is None:
        assert not isinstance(run, Mapping), "a schema is inferred from one function"
        schema = torch.library.infer_schema(run, mutates_args=())
    tag = torch.Tag.cudagraph_unsafe if waits else torch.Tag.pt2_compliant_tag
    _library.define(f"{name}{schema}", tags=(tag,))
    for key, function in run.items() if isinstance(run, Mapping) else [("CompositeExplicitAutograd", run)]:
        _library.impl(name, exactly(function), key)
    full = f"recoup::{name}"
    torch.library.register_fake(full, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(full, _outside_autocast(backward), setup_context=context, lib=_library)
    if vmap is not None:
        torch.library.register_vmap(full, vmap, lib=_library)
    if autocast:
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(full, device, torch.float32, lib=_library)
    return getattr(torch.ops.recoup, name).default


def _outside_autocast(backward: Callable) -> Callable:
    """A gradient whose own products are float32's also where ``backward`` is called inside autocast, as torch's are."""

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        device = next((grad.device.type for grad in grads if isinstance(grad, Tensor)), "cpu")
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # meta has none
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return run


def eager(x: Tensor, y: Tensor) -> bool:
    """Whether calling an operator comes to calling its kernel on the CPU, because nobody else listens: no gradient is
    kept, and no mode, transform, tracer or autocast is on. A small kernel takes less time than to ask them all.
    """
    if torch.compiler.is_compiling():  # first: compilers know it, and trace none of the rest
        return False
    plain = _plain_keys()
    return (
        type(x) in KINDS
        and type(y) in KINDS
        and torch._C._dispatch_keys(x).raw_repr() in plain
        and torch._C._dispatch_keys(y).raw_repr() in plain
        and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd.profiler._is_profiler_enabled
        and forward_ad._current_level < 0
        and not flushes()
    )


@cache
def _plain_keys() -> tuple[int, ...]:
    """The dispatch keys of tensors in memory that are no views of a special kind (conjugate, negative)."""
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.append(torch._C._dispatch_keys(torch.empty(0, dtype=torch.float32, device="cpu")).raw_repr())
    return tuple(found)


class named:  # noqa: N801 -- used as a function
    """A block whose errors name the layer and, where it is given, the shape of the layer's input."""

    __slots__ = ("given", "layer")

    def __init__(self, layer: str, given: Tensor | None = None) -> None:
        self.layer, self.given = layer, given

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, RecoupError):
            given = "" if self.given is None else f", given {list(self.given.shape)}"
            raise RecoupError(f"{self.layer}{given}: {error}") from None


def on_device(device: torch.device, who: str, cpu: Callable[[], Backend], cuda: Callable[[], Backend]) -> Backend:
    """What ``cpu`` or ``cuda`` gives; an error for any other device, on which ``who`` does not run."""
    if device.type == "cpu":
        return cpu()
    if device.type == "cuda":
        return cuda()
    raise RecoupError(f"{who} runs on the CPU and CUDA; got {device}")


def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


class needs_triton:  # noqa: N801 -- used as a function
    """A block that imports Triton's kernels: where that fails, an error that says who needs them and what to install.

    ``who``: "LBA needs"; ``sentence``: another error, with ``{who}`` and ``{error}`` where they belong.
    """

    __slots__ = ("sentence", "who")

    def __init__(self, who: str, sentence: str = WITHOUT_TRITON) -> None:
        self.who, self.sentence = who, sentence

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, ImportError):
            raise RecoupError(self.sentence.format(who=self.who, error=error)) from error


def check_capability(x: Tensor, whose: str) -> None:
    """Refuse a GPU that Triton does not support; on a CPU tensor a kernel runs in Triton's interpreter.

    ``whose``: "LBA's", the kernels that were asked for.
    """
    if x.is_cuda and (has := capability(x.device)) < CAPABILITY:
        least, here = (".".join(map(str, version)) for version in (CAPABILITY, has))
        raise RecoupError(f"{whose} kernels need compute capability {least} or later; {x.device} has {here}")


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability; looked up once, for the driver takes longer than a small kernel."""
    return torch.cuda.get_device_capability(device)
