"""Run a model in another mode and give it back as it was, also after an error or Ctrl-C."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module, train: Callable[[nn.Module], bool] | None = None) -> Iterator[None]:
    """Every module in eval mode, but those for which ``train(module)`` holds in train mode; then as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = train is not None and train(module)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
