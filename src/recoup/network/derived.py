"""Emulated classes for float classes that are known only when they are met: subclasses, classes of other packages."""

import sys
import warnings
from functools import lru_cache
from typing import Any

from torch import nn

from recoup.errors import RecoupWarning, users_level
from recoup.network.emulated import Emulated

PLAIN = frozenset({"__init__", "__repr__", "extra_repr", "_get_name", "reset_parameters", "reset_running_stats"})
"""What a subclass may define anew without computing something else."""

CALLED = ("forward", "_call_impl", "_wrapped_call_impl")
"""Methods of every module that decide what a call computes."""

DECORATE = ("torch", "contextlib")
"""Where decorators are from that are taken for a class's own, around a function of its module."""

_made: dict[tuple[type, type, bool], type[nn.Module]] = {}


def derived(emulated: type[nn.Module], float_class: type[nn.Module], *, whole: bool = True) -> type[nn.Module]:
    """The emulated class that stands in for ``float_class``: one and the same for each pair, pickled by the pair.

    Args:
        emulated: what computes.
        float_class: what it stands in for and turns back into.
        whole: whether it derives from ``float_class`` as well, so that isinstance and all of its methods stay; False
            takes over the attributes that ``float_class`` adds to the class that ``emulated`` stands in for.
    """
    key = (emulated, float_class, whole)
    if key not in _made:
        bases = (emulated, float_class) if whole else (emulated,)
        added = {} if whole else _added(float_class, emulated.float_class)  # type: ignore[attr-defined]
        added["pure"] = emulated.pure  # type: ignore[attr-defined]  # it computes what that does
        fields = {**added, "float_class": float_class, "__reduce_ex__": _reduce, "__module__": emulated.__module__}
        _made[key] = type(emulated.__name__, bases, {**fields, "__doc__": emulated.__doc__, "_made_of": key})
    return _made[key]


def is_conv1d(kind: type) -> bool:
    """Whether a class is transformers' Conv1D: a linear layer with weight [in, out]. Nothing is imported for it."""
    return (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D")


def only_adds(subclass: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a subclass computes what its base does: it overrides nothing of it but constructor and description, and
    what it adds does without super()."""
    overridden = [name for name in _own(subclass, base) if hasattr(base, name) and name not in PLAIN and _acts(name)]
    bound = [value for value in _added(subclass, base).values() if "__class__" in _free(value)]
    return not overridden and not bound


def replaced(module: nn.Module) -> list[str]:
    """Methods that are not those of the module's class: set on the object itself, as wrappers of ``forward`` are, they
    run and call what its class did when they were made, whatever its class is now; or put into a class of torch's, as
    other libraries do. What all modules have besides computing is none of them (a ``train`` that freezes), nor is what
    recoup sets for the time of a pass."""
    own = vars(module).keys() & _deciding(type(module))
    found = {name for name in own if callable(vars(module)[name]) and not _ours(vars(module)[name])}
    return sorted(found.union(patched(type(module))))


def patched(kind: type[nn.Module]) -> dict[str, str]:
    """Methods that somebody put in the place of torch's, in a class's bases: name -> the class it is in. Those that a
    subclass defines anew are not reached."""
    found = {}
    for name in _deciding(kind):
        base = next((base for base in kind.__mro__ if name in vars(base)), None)
        if base is None or issubclass(nn.Module, base) or not _known(base):
            continue
        function = _undecorated(getattr(vars(base)[name], "__func__", vars(base)[name]))
        plain = isinstance(function, type) or name == "__new__"
        if not plain and getattr(function, "__globals__", None) is not vars(sys.modules[base.__module__]):
            found[name] = base.__qualname__
    return found


def _undecorated(function: Any) -> Any:
    """What torch's own decorators (``torch.no_grad``) and Python's context managers stand around."""
    while hasattr(function, "__wrapped__"):
        around = str(getattr(function, "__globals__", {}).get("__name__"))
        if around.partition(".")[0] not in DECORATE:
            break
        function = function.__wrapped__
    return function


def say_patched(model: nn.Module, purpose: str) -> None:
    """Say which emulated layers do without a method that somebody put into their class of torch's since.

    Warns:
        RecoupWarning: one for all of them.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Emulated):
            for method, kind in patched(module.float_class).items():
                found.setdefault(f"{kind}.{method}", []).append(name)
    if found:
        told = "; ".join(f"{put}: {', '.join(names)}" for put, names in found.items())
        warnings.warn(
            f"{purpose}: methods that are not torch's own were put into its classes, and these layers on hardware do "
            f"without them, but for their float mode: {told}",
            RecoupWarning,
            stacklevel=users_level(),
        )


def _known(kind: type) -> bool:
    """Whether hardware stands in for a class because it is that class: torch's, and one of transformers."""
    return kind.__module__.startswith("torch.nn.") or is_conv1d(kind)


@lru_cache(1024)
def _deciding(kind: type[nn.Module]) -> frozenset[str]:
    """The methods of a class that may decide what a call computes."""
    bases = [base for base in kind.__mro__ if not issubclass(nn.Module, base)]
    own = {name for base in bases for name, value in vars(base).items() if callable(value)}
    return frozenset(own - PLAIN - vars(nn.Module).keys() | set(CALLED))


def _ours(value: Any) -> bool:
    """Whether it is an object of a class of recoup's: a function's ``__module__`` may be that of what it wraps."""
    return type(value).__module__.partition(".")[0] == "recoup"


def _own(subclass: type, base: type) -> dict[str, Any]:
    """What the classes between a subclass and its base define, mixed-in ones included."""
    between = [kind for kind in subclass.__mro__ if kind not in base.__mro__]
    return {name: value for kind in reversed(between) for name, value in vars(kind).items()}


def _added(subclass: type, base: type) -> dict[str, Any]:
    return {name: value for name, value in _own(subclass, base).items() if not hasattr(base, name) and _acts(name)}


def _acts(name: str) -> bool:
    """Whether an attribute is more than Python's own bookkeeping of a class."""
    return not (name.startswith("__") and name.endswith("__")) or name in ("__call__", "__getattr__", "__setattr__")


def _free(value: Any) -> tuple[str, ...]:
    function = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    return getattr(getattr(function, "__code__", None), "co_freevars", ())


def _reduce(module: Emulated, protocol: Any) -> tuple:  # noqa: ARG001 -- pickle's signature
    return _rebuilt, module._made_of, module.__getstate__()  # type: ignore[operator]


def _rebuilt(emulated: type[nn.Module], float_class: type[nn.Module], whole: bool) -> nn.Module:
    kind = derived(emulated, float_class, whole=whole)
    return kind.__new__(kind)
