"""What layers compute themselves, watched and changed before any hook has it: a hook may give another output."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from recoup.errors import RecoupWarning, users_level
from recoup.network.derived import replaced

Watch = Callable[[nn.Module, tuple, dict[str, Any], Tensor], Tensor | None]


class _Watched:
    """Stands for a layer's ``forward``, which hooks of the layer, and of all modules, come before and after."""

    def __init__(self, layer: nn.Module, watch: Watch) -> None:
        self.layer, self.watch, self.before = layer, watch, layer.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.take_off()  # who watches may ask the layer for more
        try:
            output = self.layer.forward(*args, **kwargs)
            changed = self.watch(self.layer, args, kwargs, output)
        finally:
            self.put_on()
        return output if changed is None else changed

    def put_on(self) -> None:
        self.layer.__dict__["forward"] = self

    def take_off(self) -> None:
        if self.before is None:
            self.layer.__dict__.pop("forward", None)
        else:
            self.layer.__dict__["forward"] = self.before


@contextmanager
def watching_forward(layers: Mapping[str, nn.Module], watch: Mapping[str, Watch], purpose: str) -> Iterator[None]:
    """Call ``watch[name](layer, args, kwargs, output)`` after each forward of a layer, of which ``args`` are as hooks
    left them and the output as the layer computed it; what it returns, unless None, is the output that hooks get.

    Args:
        layers: by name; each runs on one thread at a time.
        watch: what to call.
        purpose: heads the warning.

    Warns:
        RecoupWarning: layers with methods that were set on the object itself: their output is the wrapper's.
    """
    wrapped = [name for name in watch if replaced(layers[name])]
    if wrapped:
        shown = ", ".join(wrapped[:6]) + (f" and {len(wrapped) - 6} more" if len(wrapped) > 6 else "")
        warnings.warn(
            f"{purpose}: {', '.join(replaced(layers[wrapped[0]]))} was set on {len(wrapped)} layers themselves: "
            f"{shown}; what is measured is right only if it gives what the layer's own gives (take it off first, "
            "and wrap afterwards)",
            RecoupWarning,
            stacklevel=users_level(),
        )
    stands = [_Watched(layers[name], each) for name, each in watch.items()]
    try:
        for stand in stands:
            stand.put_on()
        yield
    finally:
        for stand in reversed(stands):
            stand.take_off()
