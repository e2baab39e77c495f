"""Work of a network that the array's cycles leave out: what else multiplies, by name, and how much where that is known.

Legend: B batch, L steps or tokens, E width of an attention.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recoup.models.attention import AttentionProducts
from recoup.network.emulated import Emulated
from recoup.network.hugging_face import InterfaceAttention
from recoup.network.multipliers import multipliers, own_weights
from recoup.network.products import hearing_products
from recoup.network.turns import Turn, turn

WHOLE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.modules.conv._ConvNd, AttentionProducts)
"""What `macs_of` has a formula for: products that run in them are in it."""
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class Uncounted:
    """A module that multiplies beside the array.

    Attributes:
        name: within the model.
        kind: its class in float with the module path.
        calls: how often it ran for the batch; 0: its weights were used, if at all, by a module around it.
        macs: multiply-accumulates of all calls; None where the class does not tell.
    """

    name: str
    kind: str
    calls: int
    macs: int | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for tables and JSON."""
        return asdict(self)


@contextmanager
def watching_uncounted(model: nn.Module, counted: Mapping[str, nn.Module]) -> Iterator[list[Uncounted]]:
    """Watch what multiplies besides the ``counted`` modules; the list is filled when the model has run.

    Modules that own weights are in it whether they run or not, of any other those in whose forward a product runs: of a
    buffer, of functional calls, of two activations.
    """
    found: list[Uncounted] = []
    calls: dict[str, list[int | None]] = {}
    modules = dict(model.named_modules())
    watched = {name: owner.module for name, owner in multipliers(model).items()}
    watched |= {name: module for name, module in modules.items() if isinstance(module, AttentionProducts)}

    def note(name: str, own: Turn) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if own.heard:
                calls.setdefault(name, []).append(macs_of(module, args, kwargs, output))

        return hook

    hooks: list[Any] = []
    whole = {*counted, *(name for name, module in watched.items() if isinstance(module, WHOLE))}
    try:
        with turn() as own:
            for name, module in watched.items():
                if name in counted or isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                    continue
                hooks.append(module.register_forward_hook(note(name, own), with_kwargs=True, prepend=True))
            with hearing_products(model, whole) as heard:
                yield found
    finally:
        for hook in hooks:
            hook.remove()
    beside = {name: macs for name, macs in heard.macs.items() if name not in watched}
    for name, module in watched.items():
        around = "" in beside or any(name.startswith(f"{other}.") for other in (*calls, *beside))
        if name in calls or not (name in heard.calls or around):
            done = calls.get(name, [None])
            found.append(Uncounted(name, _kind(module), len(calls.get(name, [])), _total(done)))
    for name, module in modules.items():  # whose products are operators of recoup's, of which torch counts none
        if isinstance(module, InterfaceAttention) and name not in counted and heard.calls[name]:
            beside.setdefault(name, [None])
    found += [Uncounted(name, _kind(modules[name]), heard.calls[name], _total(done)) for name, done in beside.items()]


def _kind(module: nn.Module) -> str:
    kind = module.float_class if isinstance(module, Emulated) else type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def _total(macs: Sequence[int | None]) -> int | None:
    return None if None in macs else sum(part or 0 for part in macs)


def macs_of(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> int | None:
    """The multiply-accumulates of one call, of classes of torch that have a formula: zero padding, steps of padding and
    all of an attention's scores included. None for any other class."""
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, args, kwargs)
    if isinstance(module, AttentionProducts):
        q, k, v = args[:3]
        return q.numel() * k.shape[-2] + math.prod(q.shape[:-1]) * math.prod(v.shape[-2:])
    x = args[0] if args else kwargs.get("input")
    weights = own_weights(module)
    if isinstance(module, nn.RNNBase):
        steps = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
        return _rows(steps) * weights
    if isinstance(module, nn.RNNCellBase | nn.Bilinear):
        return _rows(x) * weights
    if isinstance(module, nn.modules.conv._ConvNd) and isinstance(x, Tensor) and isinstance(output, Tensor):
        sites = (
            x.numel() // module.in_channels if isinstance(module, TRANSPOSED) else output.numel() // module.out_channels
        )
        return sites * module.weight.numel()
    return None


def _rows(x: Any) -> int:
    assert isinstance(x, torch.Tensor)
    return x.numel() // max(x.shape[-1], 1)


def _attention(module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> int:
    """Projections of queries, keys, values and output, and both products: with L_q queries and L_k keys
    B (2 L_q E E + L_k (kdim + vdim) E + 2 L_q L_k E)."""
    named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    query, key = named["query"], named["key"]
    steps = 0 if query.dim() == 2 else int(module.batch_first)
    q, k, width = query.shape[steps], key.shape[steps], module.embed_dim
    batch = 1 if query.dim() == 2 else query.shape[1 - steps]
    return batch * width * (2 * q * width + k * (module.kdim + module.vdim) + 2 * q * k)
