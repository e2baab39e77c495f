"""What a module holds beside parameters and buffers, by its bytes: counters, settings, caches, functions."""

import hashlib
import io
import marshal
import pickle
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all

from recoup.network.emulated import Emulated
from recoup.storage.digest import of_tensors

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
OF_ALL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
PLAIN_MARSHAL = 2
"""The last version of marshal whose bytes are those of the values: later ones also tell who else holds them."""
_OF_TORCH = frozenset(vars(nn.Module()))
_OURS = frozenset({"activation_scale", "activation_zero", "operand_scales", "overheard_by"})
"""What recoup leaves on float modules, for later, and what says who listens."""


def is_its_bytes(x: Tensor) -> bool:
    """Whether a tensor on the CPU is what its bytes, shape and strides say."""
    plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    return plain and x.is_cpu and not (x.is_neg() or x.is_conj())


def attributes(model: nn.Module) -> bytes | None:
    """A digest of what decides what a network computes, beside parameters, buffers and what recoup put there, as far as
    its modules hold it; None where that cannot be told: hooks that are not recoup's, tensors of other kinds,
    generators, objects that cannot be pickled. What classes, files and global variables hold is not in it.
    """
    if any(not is_ours(hook) for name in OF_ALL_HOOKS for hook in getattr(of_all, name).values()):
        return None
    found = {}
    for name, module in model.named_modules():
        if any(not is_ours(hook) for kind in HOOKS for hook in getattr(module, kind).values()):
            return None
        found[name] = _own(module)
    written = io.BytesIO()
    try:
        _Writer(written, {id(module): name for name, module in model.named_modules()}).dump(found)
    except Exception:  # whatever an object's own pickling raises, it cannot be told
        return None
    return hashlib.sha256(written.getvalue()).digest()


def _own(module: nn.Module) -> dict[str, Any]:
    left_out = _OF_TORCH | _OURS | (set(module.extras) if isinstance(module, Emulated) else set())
    return {
        name: value for name, value in vars(module).items() if name not in left_out and not name.startswith("_recoup")
    }


def is_ours(hook: Any) -> bool:
    """Whether a hook is one of recoup's own, which change no names and no outputs."""
    return getattr(hook, "__module__", type(hook).__module__).partition(".")[0] == "recoup"


class _UnknownError(Exception):
    """Something that its bytes do not tell."""


class _Function:
    """Stands for a function; what is written is compared, never read."""


class _Writer(pickle.Pickler):
    """Names modules of the network, takes tensors by their bytes, and functions by code and what they hold."""

    def __init__(self, file: io.BytesIO, names: Mapping[int, str]) -> None:
        super().__init__(file, protocol=5)
        self.names = names

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, nn.Module) and id(obj) in self.names:
            return "module", self.names[id(obj)]
        if isinstance(obj, Tensor):
            if not is_its_bytes(obj):
                raise _UnknownError
            return "tensor", str(obj.dtype), tuple(obj.shape), obj.stride(), of_tensors(obj)
        if isinstance(obj, torch.Generator):
            raise _UnknownError
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType):
            held = [cell.cell_contents for cell in obj.__closure__ or ()]
            code = marshal.dumps(obj.__code__, PLAIN_MARSHAL)
            return _Function, (obj.__module__, obj.__qualname__, code, held, obj.__defaults__, obj.__kwdefaults__)
        return NotImplemented
