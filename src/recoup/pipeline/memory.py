"""What a simulated pipeline needs in memory, known before anything is allocated."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from recoup.errors import RecoupError
from recoup.pipeline.layout import Layout
from recoup.pipeline.optimizers import SGDM
from recoup.pipeline.update import Update

MIB = 1 << 20
KEPT = 32 * MIB - 8192  # the largest piece from whose return glibc learns, 32 MiB, with its edges


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a `Simulator` keeps for its weights, beside the model's activations.

    Attributes:
        rings: D + 2 rows a stage: the versions that passes are still to use, and the one that is being written.
        newest: the newest weights, twice, where the rows hold predictions.
        state: the optimizer's, twice.
        returning: weights of backward passes that look ahead or back, twice.
        copies: of the weights that are not shown in place.
        gradients: of one step.
    """

    rings: int
    newest: int
    state: int
    returning: int
    copies: int
    gradients: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = (f"{field.name} {getattr(self, field.name) / MIB:.1f}" for field in fields(self))
        return f"{self.total / MIB:.1f} MiB ({', '.join(parts)})"


def estimate(layout: Layout, update: Update, copied: bool) -> Memory:
    """What `rings.Rings` and `gradients.Gradients` will allocate.

    Args:
        layout: of the parameters.
        update: what happens to them.
        copied: whether passes see copies only.
    """
    size = layout.dtype.itemsize
    whole = sum(layout.sizes) * size
    native = layout.device.type == "cpu" and not copied and isinstance(update.rule, SGDM)
    return Memory(
        rings=sum((D + 2) * n for D, n in zip(update.delays, layout.sizes, strict=True)) * size,
        newest=2 * whole * update.predicts,
        state=2 * whole * len(update.rule.slots),
        returning=2 * whole * update.turns,
        copies=whole if copied else sum(layout.small) * size,
        gradients=whole if native else 2 * whole,
    )


def refuse_beyond(needed: Memory, delays: Sequence[int], device: torch.device) -> None:
    """Raise where a device has less memory left than a run needs.

    Raises:
        RecoupError: with the estimate and what there is.
    """
    left = available(device)
    if left is not None and needed.total > left:
        raise RecoupError(
            f"pipeline.Simulator: the weights of all versions take {needed}, and {device} has {left / MIB:.1f} MiB "
            f"left; use fewer stages or smaller delays (here up to {max(delays)}), such as those of '1f1b'"
        )


def keep_freed() -> None:
    """Let the C library keep what a step frees, up to 64 MiB, for the next one.

    glibc gives the end of its heap back to the system once more is free there than twice the largest piece that it has
    seen returned. Whether a step's gradients end there is luck of the order of allocations, and where they do every
    step pays for the pages anew: VGG-11 for up to 4,300 and a seventh of its time. A large piece that is taken and
    returned untouched raises that bound to its most (mallopt(3), M_MMAP_THRESHOLD); elsewhere it does nothing.
    """
    torch.empty(KEPT, dtype=torch.uint8)


def available(device: torch.device) -> int | None:
    """Bytes that a device has left, as far as the system tells; None: it does not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [value for value in (_meminfo(), _cgroup()) if value is not None]
    return min(found, default=None)


def _meminfo() -> int | None:
    """Of the machine, on Linux."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup() -> int | None:
    """Of the container, where it has a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text("ascii").strip() for name in ("memory.max", "memory.current"))
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None
