"""Where a network works: the sizes of every layer that a batch reaches, from which any hardware's cost follows.

Legend: M output positions, C input channels, N output channels, T tokens, D width of a head.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.models.attention import AttentionProducts
from recoup.network.batches import call, device_of, prepared
from recoup.network.derived import is_conv1d
from recoup.network.emulated import Emulated
from recoup.network.modes import evaluating
from recoup.network.norms import is_batch_norm
from recoup.network.row_norms import features_of, is_row_norm
from recoup.network.systolic import Array, layer_cycles
from recoup.network.turns import Turn, turn
from recoup.network.uncounted import Uncounted, watching_uncounted

PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Linear)
FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product, M by C taps by N, ``groups`` times one after the other."""

    M: int
    C: int
    N: int
    taps: int = 1
    groups: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates, zero padding included."""
        return self.M * self.C * self.N * self.taps * self.groups


@dataclass(frozen=True, slots=True)
class Site:
    """One layer and all its calls for a batch.

    Attributes:
        name: within the model.
        kind: the float class's name.
        products: its matrix products; none for a norm.
        inputs, weights, outputs: how many numbers go in, how many weights it has, how many come out.
        channels, places: of a batch norm, the feature map's channels and places a sample; of a layer or RMS norm, along
            whose features all lies, both are those; 0 elsewhere.
        rows: whether it is a layer or RMS norm, whose statistics are those of a row.
    """

    name: str
    kind: str
    products: tuple[Product, ...]
    inputs: int
    weights: int
    outputs: int
    channels: int = 0
    places: int = 0
    rows: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all products."""
        return sum(product.macs for product in self.products)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Site":
        """The inverse of `to_dict`."""
        return cls(**{**values, "products": tuple(Product(**product) for product in values["products"])})


@dataclass(frozen=True, slots=True)
class Spent:
    """What a layer costs on some hardware, for a batch; each is a function of the site's sizes and the config alone.

    Attributes:
        cycles: on the array; of a norm, which runs beside it, none.
        traffic: bytes between memory and the hardware, each number once: with buffers that hold a layer's operands.
        accumulator: bits of the accumulator; 0 where there is none.
        steps: clock cycles in which a generated unit (the card's ``rtl``) works for the layer, of all units together;
            None: the wing does not say, or what it generates does not run the layer.
        no_steps: why it has none, where the wing knows.
    """

    cycles: int
    traffic: float
    accumulator: int
    steps: int | None = None
    no_steps: str = ""


def in_float(site: Site, array: Array) -> Spent:
    """The cost of a layer in float: one multiply-accumulate a cycle and element, and 32 bits a number [our definition].

    A norm reads and writes its feature map once.
    """
    numbers = site.inputs + site.weights + site.outputs
    return Spent(array_cycles(site, array), numbers * FLOAT_BITS / 8, FLOAT_BITS if site.macs else 0)


def array_cycles(site: Site, array: Array, threads: int = 1, chunk: int | None = None) -> int:
    """Cycles of a site's products, one after the other; see `layer_cycles`.

    Args:
        site: the layer.
        array: the array.
        threads: of an element.
        chunk: terms after which an element spends a cycle on adding a chunk's sum to the total.
    """
    return sum(
        layer_cycles(p.M, p.C, p.N, threads, array, taps=p.taps, groups=p.groups, extra=_extra(p, chunk))
        for p in site.products
    )


def unit_steps(site: Site, threads: int = 1, chunk: int | None = None) -> int:
    """Cycles in which an element of an array takes operands in, or adds a chunk's sum up, summed over all elements.

        sum over products of  M N groups (ceil(C / threads) taps + chunks)

    Elements that idle, at the edge of a tile and while it fills and drains, are not in it [our definition].
    """
    return sum(p.M * p.N * p.groups * (-(-p.C // threads) * p.taps + _extra(p, chunk)) for p in site.products)


def _extra(product: Product, chunk: int | None) -> int:
    """Cycles an output in which chunk sums are added up."""
    depth = product.C * product.taps
    return -(-depth // chunk) if chunk is not None and depth > chunk else 0


@dataclass(frozen=True, slots=True)
class Map:
    """The sites of a network in order of first execution, and what else multiplies."""

    sites: tuple[Site, ...]
    uncounted: tuple[Uncounted, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {name: [part.to_dict() for part in getattr(self, name)] for name in ("sites", "uncounted")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Map":
        """The inverse of `to_dict`."""
        sites = tuple(map(Site.from_dict, values["sites"]))
        return cls(sites, tuple(Uncounted(**part) for part in values["uncounted"]))


@torch.no_grad()
def survey(model: nn.Module, inputs: Any, purpose: str) -> Map:
    """Run a model once, in eval mode, and note the sizes of its layers.

    Every Conv1d, Conv2d, Linear, Conv1D of transformers, `AttentionProducts`, batch norm and layer or RMS norm is a
    site, in float or on hardware. What else multiplies is listed beside them.

    Args:
        model: any module.
        inputs: a batch as in `recoup.network.batches`, or the shape of one image, such as (3, 32, 32).
        purpose: heads errors.

    Raises:
        RecoupError: a shape that is none, a bad batch, an input that the model fails on (which layer did is named), a
            model that runs no such layer.
    """
    if isinstance(inputs, Sequence) and not any(isinstance(value, Tensor) for value in inputs):
        if not inputs or not all(isinstance(size, int) and size > 0 for size in inputs):
            raise RecoupError(f"{purpose}: a shape has positive whole sizes, such as (3, 32, 32); got {inputs!r}")
        inputs = torch.zeros(1, *inputs, device=device_of(model))
    layers = {name: module for name, module in model.named_modules() if is_site(module)}
    found: dict[str, Site] = {}
    with turn() as own, _noting(layers, found, own), watching_uncounted(model, layers) as uncounted, evaluating(model):
        for batch, _ in prepared(model, [inputs], purpose):
            _called(model, batch, purpose)
    if not found:
        raise RecoupError(f"{purpose}: the model ran no convolution, linear layer, attention product or norm")
    return Map(tuple(found.values()), tuple(uncounted))


def _called(model: nn.Module, batch: Any, purpose: str) -> None:
    """Run a model; where it fails, the layer that does is named with its input."""
    # No tensor is held: every layer's input would lie in memory at once.
    last: tuple[str, list[int] | None] = ("", None)

    def enter(name: str) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal last
            given = (list(one.shape) for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
            last = (name, next(given, None))

        return hook

    hooks = [
        module.register_forward_pre_hook(enter(name), with_kwargs=True)
        for name, module in model.named_modules()
        if is_site(module)
    ]
    try:
        call(model, batch)
    except RecoupError:
        raise
    except Exception as error:  # a network of the user's may fail in any way
        shapes = {k: list(v.shape) for k, v in batch.items()} if isinstance(batch, Mapping) else list(batch.shape)
        modules, (name, given) = dict(model.named_modules()), last
        at = f", at layer {name!r} ({modules[name].extra_repr()}), whose input is {given}" if given else ""
        told = (str(error).splitlines() or ["no message"])[0]
        raise RecoupError(
            f"{purpose}: the model does not take an input of shape {shapes}{at}: {type(error).__name__}: {told}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _noting(layers: Mapping[str, nn.Module], found: dict[str, Site], own: Turn) -> Iterator[None]:
    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if not own.heard:
                return
            site = _site(name, module, (*args, *kwargs.values()), output)
            found[name] = site if name not in found else _both(found[name], site)

        return hook

    hooks = [
        module.register_forward_hook(note(name), with_kwargs=True, prepend=True) for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_site(module: nn.Module) -> bool:
    """Whether `survey` knows a module's sizes."""
    norm = is_batch_norm(module) or is_row_norm(module)
    return norm or isinstance(module, (*PRODUCTS, AttentionProducts)) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """A Conv1D of transformers: a linear layer with weight [C, N]."""
    return is_conv1d(float_class(module))


def float_class(module: nn.Module) -> type[nn.Module]:
    """The class of a layer as it is in float."""
    return module.float_class if isinstance(module, Emulated) else type(module)


def _site(name: str, module: Any, args: tuple, y: Tensor) -> Site:
    kind, x = float_class(module).__name__, args[0]
    if is_batch_norm(module):
        places = math.prod(y.shape[2:])
        return Site(name, kind, (), x.numel(), 0, y.numel(), y.shape[1], places)
    if is_row_norm(module):
        features = features_of(module)
        return Site(name, kind, (), x.numel(), 0, y.numel(), features, features, rows=True)
    if isinstance(module, AttentionProducts):
        q, k, v = args[:3]
        heads, tokens = math.prod(q.shape[:-2]), q.shape[-2]
        products = (
            Product(tokens, q.shape[-1], k.shape[-2], groups=heads),
            Product(tokens, v.shape[-2], v.shape[-1], groups=heads),
        )
        scores = heads * tokens * k.shape[-2]
        return Site(name, kind, products, q.numel() + k.numel() + v.numel() + scores, 0, scores + y.numel())
    weight, groups = module.weight, getattr(module, "groups", 1)
    if _is_transposed(module):
        product = Product(y.numel() // weight.shape[1], weight.shape[0], weight.shape[1])
    else:
        N = weight.shape[0]
        taps = math.prod(weight.shape[2:])  # of its sizes alone: a view of it would be one more operator that is heard
        product = Product(y.numel() // N, weight.shape[1], N // groups, taps, groups)
    return Site(name, kind, (product,), x.numel(), weight.numel(), y.numel())


def _both(one: Site, other: Site) -> Site:
    """Two calls of one layer: products one after the other; its weights are read for each."""
    sums = {name: getattr(one, name) + getattr(other, name) for name in ("inputs", "weights", "outputs")}
    return Site(
        one.name,
        one.kind,
        one.products + other.products,
        **sums,
        channels=one.channels,
        places=one.places,
        rows=one.rows,
    )
