"""From ``"resnet20"`` or ``"package.module:factory"`` to a network."""

import difflib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from recoup.errors import RecoupError
from recoup.models.cifar import resnet20, resnet32, resnet44, resnet56, resnet110
from recoup.models.digits import digits_net
from recoup.models.hugging_face import PREFIX, from_folder
from recoup.models.imagenet import resnet18, resnet34, resnet50
from recoup.models.mobilenet import mobilenet_v1
from recoup.models.transformer import chargpt
from recoup.models.vgg import vgg11, vgg13, vgg16
from recoup.models.weights import load_weights_

Factory = Callable[..., object]
LISTED = 16

FACTORIES: dict[str, Factory] = {
    factory.__name__: factory
    for factory in (
        *(digits_net, resnet18, resnet20, resnet32, resnet34, resnet44, resnet50, resnet56, resnet110),
        *(vgg11, vgg13, vgg16, mobilenet_v1, chargpt),
    )
}


def load(spec: str, weights: str | Path | None = None, *, num_classes: int | None = None, **options: Any) -> nn.Module:
    """The network that ``spec`` names, with fresh weights or those of a file.

    Args:
        spec: a name of :mod:`recoup.models` (``"resnet20"``) or ``"package.module:factory"``
            (``"torchvision.models:resnet18"``, ``"mypackage.nets:Net"``); the module is imported, so name only code you
            trust. ``"hf:FOLDER"``: what ``save_pretrained`` of Hugging Face transformers wrote there.
        weights: a weights file, read as :func:`load_weights_` does.
        num_classes: passed on to the factory where given.
        options: further keyword arguments of the factory, such as ``norm="group"``.

    Returns:
        What the factory built, in training mode as torch leaves it; call ``.eval()`` before measuring accuracy.

    Raises:
        RecoupError: the module cannot be imported, has no such factory (the nearest names are listed), the factory does
            not take an argument or does not return an ``nn.Module``, or the weights do not fit. What the factory itself
            raises passes through.

    >>> type(load("recoup.models:resnet20", num_classes=100)).__name__
    'CifarResNet'
    >>> load("resnet21")
    Traceback (most recent call last):
    recoup.errors.RecoupError: model 'resnet21': recoup.models has no factory 'resnet21'; it has ...
    """
    factory = factory_of(spec)
    arguments = options if num_classes is None else {"num_classes": num_classes, **options}
    _check_arguments(spec, factory, arguments)
    model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise RecoupError(f"model {spec!r}: the factory returned {_a(model)}, not an nn.Module")
    return model if weights is None else load_weights_(model, weights)


def factory_of(spec: str) -> Factory:
    """What builds the network that ``spec`` names; see `load`.

    Raises:
        RecoupError: no such factory.
    """
    if not isinstance(spec, str):
        raise RecoupError(f"models.load(spec={spec!r}): spec must be a name such as resnet20 or package.module:factory")
    if spec.startswith(PREFIX):
        return lambda: from_folder(spec)
    module_name, colon, name = spec.rpartition(":")
    if not colon:
        if spec not in FACTORIES:
            raise RecoupError(f"model {spec!r}: {_no_factory('recoup.models', spec, list(FACTORIES))}")
        return FACTORIES[spec]
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise RecoupError(f"model {spec!r}: a model is a name such as resnet20 or package.module:factory")
    module = _import(spec, module_name)
    factory = getattr(module, name, None)
    if isinstance(factory, nn.Module):
        raise RecoupError(f"model {spec!r}: that is a model already built; name a function or class that builds one")
    if not callable(factory):
        raise RecoupError(f"model {spec!r}: {_no_factory(module_name, name, _candidates(module))}")
    return factory


def _import(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            file = name.endswith(".py") and f"; a module is named without .py: {spec.replace('.py:', ':')}"
            raise RecoupError(
                f"model {spec!r}: there is no module {error.name} on Python's path"
                f"{file or '; install it or set PYTHONPATH'}"
            ) from error
        raise RecoupError(f"model {spec!r}: importing {name} failed: {error}") from error
    except Exception as error:  # a module runs its own code when imported, and that may raise anything
        raise RecoupError(f"model {spec!r}: importing {name} failed: {type(error).__name__}: {error}") from error


def _candidates(module: ModuleType) -> list[str]:
    """Public functions and nn.Module classes of a module."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    found = ((name, getattr(module, name, None)) for name in names)
    return [
        name
        for name, value in found
        if inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, nn.Module))
    ]


def _no_factory(module_name: str, name: str, candidates: list[str]) -> str:
    """Says so and lists the names there are, the nearest first."""
    near = difflib.get_close_matches(name, candidates, n=4)
    listed = [*near, *(candidate for candidate in candidates if candidate not in near)]
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return f"{module_name} has no factory {name!r}; it has {', '.join(listed[:LISTED]) or 'none'}{more}"


def _check_arguments(spec: str, factory: Factory, arguments: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # built in C: it has no signature to check against
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise RecoupError(f"model {spec!r}: {error}; the factory takes {signature}") from error


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
