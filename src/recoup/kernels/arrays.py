"""A tensor's memory as a NumPy array, for the length of a call, that leaves the tensor's storage as free as before.

``Tensor.numpy()`` marks the storage as never to be resized, for good; FSDP resizes the storage of parameters around
every forward pass ("Trying to resize storage that is not resizable").
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recoup.errors import RecoupError

__all__ = ["array"]

DTYPES: dict[torch.dtype, str] = {
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.int8: "|i1",
    torch.uint8: "|u1",
    torch.int16: "<i2",
    torch.int32: "<i4",
    torch.int64: "<i8",
    torch.bool: "|b1",
}


def array(x: Tensor) -> np.ndarray:
    """The same memory, shape and strides; it must not outlive the call, for the storage may move.

    The array keeps the tensor alive, and neither its gradient nor its storage's freedom is touched.

    Args:
        x: on the CPU.

    Raises:
        RecoupError: another device, or a dtype that NumPy lacks.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> array(x).sum()
    np.float32(6.0)
    >>> x.untyped_storage().resizable()
    True
    """
    if not x.is_cpu or x.dtype not in DTYPES:
        raise RecoupError(
            f"array: x must be a tensor on the CPU of a dtype that NumPy has; got {x.dtype} on {x.device}"
        )
    return np.asarray(_Memory(x))


class _Memory:
    """NumPy's array interface over a tensor."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def __array_interface__(self) -> dict[str, Any]:
        x = self.tensor
        size = x.element_size()
        return {
            "version": 3,
            "typestr": DTYPES[x.dtype],
            "shape": tuple(x.shape),
            "strides": tuple(size * step for step in x.stride()),
            "data": (x.data_ptr(), False),
        }
