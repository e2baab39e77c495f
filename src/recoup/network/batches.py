"""What recoup takes as data: any iterable of batches, from a list of tensors to a DataLoader.

A batch is the input tensor itself, a tuple or list ``(input, label, ...)``, or a mapping of keyword arguments for the
model in which ``labels`` (or ``label``) holds the labels.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.network.attributes import is_ours
from recoup.network.checks import is_module, strided
from recoup.network.derived import say_patched

LABELS = ("labels", "label")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies (the CPU for a model without any)."""
    first = next((t for tensors in (model.parameters(), model.buffers()) for t in tensors), None)
    return first.device if first is not None else torch.device("cpu")


def split(batch: Any) -> tuple[Any, Tensor | None]:
    """A batch's model input (a tensor or a mapping of keyword arguments) and its labels, None if it has none."""
    if isinstance(batch, Mapping):
        label = next((batch[name] for name in LABELS if name in batch), None)
        return {name: value for name, value in batch.items() if name not in LABELS}, label
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise RecoupError("a batch is an empty tuple: expected (input, label)")
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's output; of a Hugging Face style output, its logits."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return getattr(output, "logits", output)


def count(inputs: Any) -> int:
    """How many samples the input of one batch holds."""
    tensor = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    return int(tensor.shape[0]) if tensor.dim() else 0


def prepared(
    model: nn.Module,
    batches: Iterable[Any],
    purpose: str,
    progress: bool = False,
    seen: Callable[[Any, Any], None] | None = None,
) -> Iterator[tuple[Any, Tensor | None]]:
    """Iterate over (input, label), on the model's device, checked.

    Args:
        model: gives the device.
        batches: the iterable of batches.
        purpose: what the caller is doing; heads the progress bar and the errors.
        progress: whether to show a progress bar on standard error.
        seen: called with every input and label as they came, before they are moved to the device.

    Warns:
        RecoupWarning: emulated layers whose class in torch has had methods replaced since (`derived.say_patched`).

    Raises:
        RecoupError: no batch at all, an empty batch, a mapping whose keys the model does not take, an input that is no
            tensor, NaN or infinity in an input, tokens that are padding for a network of transformers without the mask
            that hides it.
    """
    is_module(model, purpose)
    say_patched(model, purpose)
    check_batches(batches, purpose)
    device = device_of(model)
    samples = 0
    for number, batch in enumerate(_shown(batches, purpose) if progress else batches):
        given, label = split(batch)
        if isinstance(given, Mapping) and not number:
            _check_names(model, batch, given, purpose)
        inputs = (
            {k: _checked(v, purpose, number, device) for k, v in given.items()}
            if isinstance(given, Mapping)
            else _checked(given, purpose, number, device)
        )
        _check_padding(model, inputs, purpose, number)
        samples += count(inputs)
        if seen is not None:
            seen(given, label)
        yield inputs, label.to(device) if isinstance(label, Tensor) else label
    if not samples:
        raise RecoupError(
            f"{purpose}: there was no batch; pass a list or a DataLoader with at least one batch "
            "(a generator is empty the second time)"
        )


def reread(batches: Iterable[Any], purpose: str) -> Iterable[Any]:
    """Batches that can be read several times: those of a generator are kept in memory.

    Raises:
        RecoupError: what is no iterable of batches.
    """
    check_batches(batches, purpose)
    return batches if hasattr(batches, "__len__") else list(batches)


def check_batches(batches: Any, purpose: str) -> None:
    if isinstance(batches, (Tensor, Mapping, str, type)) or not isinstance(batches, Iterable):
        raise RecoupError(
            f"{purpose}: batches must be an iterable of batches; got one {type(batches).__name__}: pass [x]"
        )


def _check_names(model: nn.Module, batch: Mapping[Any, Any], given: Mapping[Any, Any], purpose: str) -> None:
    """Refuse a mapping whose keys are not arguments of the model, as data sets call what they hold."""
    if any(not is_ours(model._forward_pre_hooks[number]) for number in model._forward_pre_hooks_with_kwargs):
        return  # a hook may give them other names: the call itself will say
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # of compiled code: the call itself will say
        return
    try:
        signature.bind(**given)
    except TypeError as error:
        name = next(iter(given), "image")
        label = next((key for key in (*LABELS, *list(given)[1:]) if key in batch), "label")
        raise RecoupError(
            f"{purpose}: a batch is a mapping ({', '.join(map(str, given))}), whose values go to the model by these "
            f"names, but {type(model).__name__}.forward takes {signature}: {error}. Pass pairs of input and label: "
            f"[(batch[{name!r}], batch[{label!r}]) for batch in loader]"
        ) from error


def _check_padding(model: nn.Module, inputs: Any, purpose: str, number: int) -> None:
    """Refuse padded tokens without a mask: they would be looked at, calibrated and fitted like any other.

    Padding is what transformers' config calls so, twice or more at an end of a sequence: once may be a word. A network
    that ends sequences with it hides nothing by it.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile made takes anything, by its signature
    own = getattr(model, "config", None)
    pad, end = getattr(own, "pad_token_id", None), getattr(own, "eos_token_id", None)
    tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(pad, int) or pad in (end if isinstance(end, list) else [end]) or not isinstance(tokens, Tensor):
        return
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_meta or tokens.shape[1] <= 2:
        return
    if isinstance(inputs, Mapping) and inputs.get("attention_mask") is not None:
        return
    padded = ((tokens[:, :2] == pad).all(1) | (tokens[:, -2:] == pad).all(1)).sum()
    if padded and "attention_mask" in inspect.signature(model.forward).parameters:
        raise RecoupError(
            f"{purpose}: batch {number} has padding (token {pad}) in {int(padded)} of its {len(tokens)} sequences and "
            "no mask that hides it: pass mappings with attention_mask, as tokenizers return them (ones where the "
            "tokens are to be looked at)"
        )


def _checked(value: Any, purpose: str, number: int, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        raise RecoupError(f"{purpose}: the input of batch {number} is a {type(value).__name__}, expected a tensor")
    strided(value, purpose, f"batch {number}")
    if value.is_meta and device.type != "meta":
        raise RecoupError(f"{purpose}: batch {number} is a meta tensor {list(value.shape)}, which holds no values")
    if value.dim() == 0 or value.shape[0] == 0:
        raise RecoupError(f"{purpose}: batch {number} is empty (shape {list(value.shape)})")
    if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
        raise RecoupError(f"{purpose}: batch {number} (shape {list(value.shape)}) holds NaN or infinity")
    return value.to(device)


def _shown(batches: Iterable[Any], purpose: str) -> Iterator[Any]:
    try:
        total = len(batches)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader over an iterable dataset has __len__ and no length
        total = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(batches, total=total, description=purpose)
