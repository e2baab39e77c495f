"""Arguments that are no plain values, checked where a public function takes them: models, tensors, configs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.network.shared import Shared

__all__ = [
    "as_float32",
    "float32_products",
    "float64_alike",
    "instance",
    "is_module",
    "one_device",
    "reduced_float32",
    "strided",
]

T = TypeVar("T")


def is_module(model: Any, owner: str) -> None:
    """An error unless ``model`` is a torch module."""
    if not isinstance(model, nn.Module):
        raise RecoupError(f"{owner}: model must be a torch.nn.Module; got {_kind(model)}")


def instance(value: Any, kind: type[T], owner: str, name: str, example: str) -> T:
    """``value`` if it is a ``kind``, or an error that shows one."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEILN" and kind.__name__[:2].isupper() else "a"
        raise RecoupError(f"{owner}: {name} must be {article} {kind.__name__}, such as {example}; got {value!r}")
    return value


def strided(value: Any, owner: str, name: str) -> Tensor:
    """``value`` if it is a tensor with an element at every index, or an error: kernels read memory by strides."""
    if not isinstance(value, Tensor):
        raise RecoupError(f"{owner}: {name} must be a tensor; got {_kind(value)}")
    if value.layout != torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise RecoupError(f"{owner}: {name} is a {layout} tensor {list(value.shape)}: convert it with .to_dense()")
    return value


def as_float32(x: Tensor, layer: str, emulation: str, name: str = "the input") -> Tensor:
    """An operand that is quantised before the operator sees it: cast as the operator would, under autocast alone.

    Args:
        x: the operand.
        layer: what an error calls the layer.
        emulation: and what it is that takes float32 alone.
        name: and the operand.
    """
    strided(x, layer, name)
    if x.dtype in (torch.float16, torch.bfloat16) and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x.float()
    if x.dtype != torch.float32:
        raise RecoupError(
            f"{layer}: {emulation} takes float32; {name} is {x.dtype} {list(x.shape)}: convert with .float()"
        )
    return x


def float32_weights(weight: Tensor, layer: str, emulation: str) -> None:
    """Refuse weights that are not float32, as those of networks in half precision."""
    if weight.dtype != torch.float32:
        raise RecoupError(
            f"{layer}: {emulation} takes float32 weights; got {weight.dtype}: convert the network with .float() first"
        )


def float64_alike(x: Tensor, parameters: torch.dtype, layer: str, kind: str) -> None:
    """An error for float64 on one side alone, which torch's batch and layer norms refuse too.

    Half precision beside float32 is taken either way: the values are exact in what is computed in.
    """
    if (x.dtype == torch.float64) != (parameters == torch.float64):
        raise RecoupError(
            f"{layer}: the input is {x.dtype} {list(x.shape)}, the parameters are {parameters}: a {kind} takes float64 "
            "for both or for neither"
        )


def float32_products(x: Tensor) -> AbstractContextManager[Any]:
    """Products of float32 operands in float32, whatever autocast, or on the CPU a precision that was set for float32
    (`reduced_float32`), would make of them."""
    if x.is_cpu and (not torch.compiler.is_compiling() or _reduced()):  # no compiler knows locks
        return _whole_float32()
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def reduced_float32() -> dict[str, str]:
    """What of torch's operators may compute float32 in fewer bits on the CPU (``matmul``, ``conv``), and in which:
    ``bf16`` under ``torch.set_float32_matmul_precision("medium")`` or ``torch.backends.mkldnn``'s ``fp32_precision``,
    where the processor has instructions for it."""
    return dict(_reduced())


def _reduced() -> list[tuple[str, str]]:
    found = [(name, torch._C._get_fp32_precision_getter("mkldnn", name)) for name in ("matmul", "conv")]
    return [(name, value) for name, value in found if value in ("bf16", "tf32")]


# What torch.compiler.assume_constant_result does, which would load the compiler with this module.
_reduced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _restrict() -> Callable[[], None] | None:
    """Have whole float32 products; the setting is torch's for all threads."""
    before = _reduced()

    def put_back() -> None:
        for name, value in before:  # one that follows a wider setting goes on doing so
            follows = torch._C._get_fp32_precision_getter("mkldnn", "all") == value
            torch._C._set_fp32_precision_setter("mkldnn", name, "none" if follows else value)

    for name, _ in before:
        torch._C._set_fp32_precision_setter("mkldnn", name, "ieee")
    return put_back if before else None


_whole = Shared(_restrict)


@contextmanager
def _whole_float32() -> Iterator[None]:
    user = _whole.enter()
    try:
        with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext():
            yield
    finally:
        if user is not None:
            _whole.leave(user)


def one_device(owner: str, *tensors: Tensor) -> None:
    """An error if the tensors lie on several devices, of which meta is one: torch picks a kernel by any of them."""
    places = dict.fromkeys(str(tensor.device) for tensor in tensors)
    if len(places) > 1:
        raise RecoupError(f"{owner}: the operands lie on {' and '.join(places)}; they must lie on one device")


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
