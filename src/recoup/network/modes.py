"""Run a model in another mode and give it back as it was, also after an error or Ctrl-C."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from recoup.network.nested import taking_nested
from recoup.network.shared import Shared, TrainModes

_modes = TrainModes()


@contextmanager
def evaluating(
    model: nn.Module, train: Callable[[nn.Module], bool] | None = None, *, eager: bool = True
) -> Iterator[None]:
    """Every module in eval mode, but those for which ``train(module)`` holds in train mode; then as before.

    Hooks that are to be there meanwhile are registered before: those of torch's encoders then take padded sequences.

    Args:
        model: any module, compiled or not.
        train: which modules are in train mode.
        eager: whether what `torch.compile` made runs as it was written (`uncompiled`); False leaves that to the caller.
    """
    own = _modes.change(model.modules(), train or (lambda _: False))
    try:
        with taking_nested(model), uncompiled() if eager else nullcontext():
            yield
    finally:
        _modes.put_back(own)


def compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` made any of it."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        or "_orig_mod" in module._modules
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def uncompiled() -> AbstractContextManager[None]:
    """Run what `torch.compile` made as it was written: compiled code looks neither at hooks that were registered after
    it was compiled nor at a layer's mode, so that whoever measures by hooks would see nothing."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and importing it takes seconds
        return nullcontext()
    return eagerly()


@contextmanager
def eagerly() -> Iterator[None]:
    """What `torch.compile` made, and operators of torch's that compile, run as they are written, on all threads; the
    compiler is loaded."""
    import torch._dynamo  # noqa: F401 -- not under a lock

    user = _eager.enter()
    try:
        yield
    finally:
        if user is not None:
            _eager.leave(user)


def _force_eager() -> Callable[[], object]:
    stance = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


_eager = Shared(_force_eager)
