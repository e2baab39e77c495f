"""What passes a cut: a tuple of tensors that travels as one message, and the header that says once what is in it."""

import torch
from torch import Tensor

from recoup.errors import RecoupError

Packet = tuple[Tensor, ...]
Kinds = list[tuple[torch.dtype, torch.Size]]
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8),
    *(torch.int16, torch.int8, torch.bool),
)
MEMBERS, SIZES = 16, 8  # the most tensors of a packet, and dimensions of one
HEADER = 1 + MEMBERS * (2 + SIZES)  # how many; of each dtype, dimensions, and sizes
ALIGNMENT = 64  # bytes: where members begin in a message, so that kernels find them as if they were allocated


def kinds_of(packet: Packet) -> Kinds:
    """The members' dtypes and shapes."""
    return [(x.dtype, x.shape) for x in packet]


def header(kinds: Kinds) -> Tensor:
    """What a receiver must know before the first packet.

    Raises:
        RecoupError: more members, or others, than can be told.
    """
    if len(kinds) > MEMBERS or any(dtype not in DTYPES or len(shape) > SIZES for dtype, shape in kinds):
        raise RecoupError(
            f"pipeline: a packet of {shown(kinds)} cannot be sent: up to {MEMBERS} tensors of up to {SIZES} dimensions"
        )
    numbers = [len(kinds)]
    for dtype, shape in kinds:
        numbers += [DTYPES.index(dtype), len(shape), *shape, *[0] * (SIZES - len(shape))]
    return torch.tensor(numbers + [0] * (HEADER - len(numbers)), dtype=torch.int64)


def announced(header: Tensor) -> Kinds:
    """The inverse of `header`."""
    count, *numbers = header.tolist()
    found: Kinds = []
    for at in range(0, count * (2 + SIZES), 2 + SIZES):
        kind, dims, *sizes = numbers[at : at + 2 + SIZES]
        found.append((DTYPES[kind], torch.Size(sizes[:dims])))
    return found


def length(kinds: Kinds) -> int:
    """Bytes of a message, a multiple of `ALIGNMENT`; some, so that an empty packet is a message too."""
    return max(ALIGNMENT, sum(_room(dtype, shape) for dtype, shape in kinds))


def members(message: Tensor, kinds: Kinds) -> Packet:
    """The tensors in a message, as views of it."""
    found, at = [], 0
    for dtype, shape in kinds:
        found.append(message[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape))
        at += _room(dtype, shape)
    return tuple(found)


def refuse_others(kinds: Kinds, before: Kinds, rank: int) -> None:
    """Raise unless a packet is like those before it."""
    if kinds != before:
        raise RecoupError(
            f"pipeline: rank {rank} would send {shown(kinds)}, unlike the packets before, {shown(before)}; all samples "
            "must have the same shape"
        )


def shown(kinds: Kinds) -> str:
    """For an error."""
    return ", ".join(f"{dtype} {list(shape)}" for dtype, shape in kinds) or "nothing"


def _room(dtype: torch.dtype, shape: torch.Size) -> int:
    return -(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
