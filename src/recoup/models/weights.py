"""Filling a model from a weights file: tensors only, every key accounted for, and never half."""

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.fields import location
from recoup.models.blocks import M
from recoup.storage.kinds import EXPORTED, REMEDIES, SCRIPT, kind_of

NESTS = ("state_dict", "model_state_dict", "model", "net")  # where training scripts put the tensors, first match wins
# Where they put averages of them (timm, torchvision's references, DeiT and others).
AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_state_dict_ema", "ema_model", "net_ema")
PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
_PREFIXES = re.compile(f"^({'|'.join(map(re.escape, PREFIXES))})+")
COUNT = "n_averaged"  # beside the network in torch.optim.swa_utils.AveragedModel
SHOWN = 4


def load_weights_(model: M, path: str | Path) -> M:
    """Copy the tensors of a weights file into ``model``, in place; returns ``model``.

    ``*.safetensors`` is read by safetensors, anything else by ``torch.load(weights_only=True)``: a pickle that names
    code is refused and its code never runs. The tensors may lie under ``state_dict``, ``model_state_dict``, ``model``
    or ``net``, or as averages under ``state_dict_ema``, ``model_ema``, ``ema`` and the like; where a file holds several
    that differ, ``FILE#KEY`` says which: ``"last.pth.tar#state_dict_ema"``. Every name may begin with ``module.`` or
    ``_orig_mod.``, or with the name that another module (a LightningModule) knows the network by, if the rest is the
    model's names. They are copied to the model's own device and floating-point type. BatchNorm's
    ``num_batches_tracked`` may be missing (files older than torch 0.4.1): the model keeps its own. The count of
    averages, ``n_averaged``, that torch's AveragedModel puts beside its network is left. Nothing else may be missing,
    left over, or of another shape.

    Args:
        model: the network to fill; unchanged if anything fails.
        path: the weights file, or ``FILE#KEY``: what lies under a key of it.

    Raises:
        RecoupError: no such file, a folder, a truncated or foreign file, a pickle with code, several state dicts that
            differ and no key, or tensors that do not fit; it names the first keys that are missing, unexpected or of
            another shape.

    >>> from recoup.models import digits_net
    >>> load_weights_(digits_net(), "no-such-file.pt")
    Traceback (most recent call last):
    recoup.errors.RecoupError: no-such-file.pt: no such file
    """
    if not isinstance(model, nn.Module):
        raise RecoupError(f"load_weights_: model must be a torch.nn.Module; got {type(model).__name__}")
    path = location("load_weights_", "path", path)
    tensors = read_weights(path)
    own = model.state_dict()
    metadata = getattr(tensors, "_metadata", None)
    tensors = _without_prefixes(tensors, own)
    faults = _mismatches(tensors, own)
    if faults:
        raise RecoupError(f"{path} does not fit {type(model).__name__}: {'; '.join(faults)}")
    before = OrderedDict((name, v.clone() if isinstance(v, Tensor) else v) for name, v in own.items())
    before._metadata = getattr(own, "_metadata", None)  # type: ignore[attr-defined]
    try:
        model.load_state_dict(_completed(own, tensors, metadata))
    except Exception as error:  # a layer's own loading hook may refuse what the names and shapes allow
        model.load_state_dict(before)
        raise RecoupError(f"{path} does not fit {type(model).__name__}: {error}") from error
    return model


def _completed(own: Mapping[str, object], tensors: Mapping[str, Tensor], metadata: object) -> OrderedDict[str, object]:
    """The file's tensors, the model's own where the file has none, and the file's metadata by unprefixed name."""
    state = OrderedDict({**own, **tensors})
    if isinstance(metadata, Mapping):
        names = {_PREFIXES.sub("", str(name)): value for name, value in metadata.items()}
        state._metadata = names  # type: ignore[attr-defined]
    return state


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU, as the file has them; errors as :func:`load_weights_`."""
    given, (path, key) = path, file_and_key(path)
    if key is not None and not path.is_file():
        raise RecoupError(f"{given}: no such file, nor a file {path} to take {key!r} from")
    if path.is_dir():
        raise RecoupError(f"{path} is a folder; give the weights file itself")
    if not path.exists():
        raise RecoupError(f"{path}: no such file")
    kind = kind_of(path)
    if kind in (SCRIPT, EXPORTED):
        raise RecoupError(f"{path} is {kind}, which is code; {REMEDIES[kind].replace('FILE', repr(str(path)))}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" or _is_safetensors(path) else _read_pickle(path)
    return _state_dict(path, content if key is None else _under(path, content, key))


def file_and_key(path: str | Path) -> tuple[Path, str | None]:
    """``FILE#KEY`` apart; a file that is called so is itself."""
    file, mark, key = str(path).rpartition("#")
    return (Path(file), key) if mark and key and file and not Path(path).exists() else (Path(path), None)


def _under(path: Path, content: object, key: str) -> object:
    """What a file holds under a key that was asked for."""
    held = content if isinstance(content, Mapping) else {}
    if not isinstance(held.get(key), Mapping):
        legal = [str(name) for name, value in held.items() if isinstance(value, Mapping) and _weighs(value)]
        listed = f"under {', '.join(legal)}" if legal else "under no key: leave #KEY out"
        raise RecoupError(f"{path}#{key}: the file holds no weights under {key!r}; it holds them {listed}")
    return held[key]


def _is_safetensors(path: Path) -> bool:
    """Whether a file of another name begins as safetensors do: the length of a JSON header, and the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            extras = "recoup" in (file.metadata() or {})  # written by recoup.save: beside them a float checkpoint
        return {
            name: value for name, value in tensors.items() if not (extras and name.startswith(("recoup.", "recoup/")))
        }
    except (SafetensorError, OSError) as error:
        raise RecoupError(f"{path} cannot be read as safetensors; truncated or another format? ({error})") from error


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            # Torch warns of a pickle protocol it did not write, then reads the file or refuses it: that is our answer.
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file makes the unpickler raise anything at all
        raise RecoupError(_pickle_fault(path, error)) from error


def _pickle_fault(path: Path, error: Exception) -> str:
    """Why torch could not read the file: it names code, it is some other pickle, or it is no checkpoint at all."""
    if isinstance(error, pickle.UnpicklingError):
        remedy = (
            "a weights file may hold tensors only; re-save it with safetensors or torch.save(model.state_dict(), ...)"
        )
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name:
            return f"{path} refused: reading it would import and run {name[1]}, and {remedy}"
        with path.open("rb") as file:
            if file.read(1) == pickle.PROTO:
                return f"{path} refused: a pickle of Python objects, which can run code when read, and {remedy}"
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error)) or re.search(r"(.+)", str(error))
    detail = f"{type(error).__name__}: {reason[1][:100]}" if reason else type(error).__name__
    return f"{path} cannot be read as a torch checkpoint; truncated or another format? ({detail})"


def _state_dict(path: Path, content: object) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        nest = _nest(path, content)
        if nest is None:
            break
        content = content[nest]
    if not isinstance(content, Mapping) or not content:
        raise RecoupError(
            f"{path} holds {'an empty' if content == {} else 'a'} {type(content).__name__}, no state dict"
        )
    strange = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise RecoupError(
            f"{path} holds no plain state dict: {_some(strange)} not tensors; they may lie under {', '.join(NESTS)}"
        )
    state = OrderedDict((str(name), tensor) for name, tensor in content.items())
    metadata = getattr(
        content, "_metadata", None
    )  # torch's own per-module notes; a converted network's scales are there
    if metadata is not None:
        state._metadata = metadata  # type: ignore[attr-defined]
    return state


def _nest(path: Path, content: Mapping[Any, Any]) -> str | None:
    """The key that the tensors lie under; what is called so but holds none, as a model's options, only for want of one.

    Raises:
        RecoupError: tensors that differ under several: none is taken without a word.
    """
    nests = [name for name in (*NESTS, *AVERAGED) if isinstance(content.get(name), Mapping)]
    full = [name for name in nests if _weighs(content[name])]
    full = [name for name in full if _weighs(content[name], least=2)] or full  # an average's decay and count are none
    if len(full) > 1 and not all(_alike(content[full[0]], content[name]) for name in full[1:]):
        averaged = ", ".join(name for name in full if name in AVERAGED)
        said = (
            f"; {averaged}: an average over training, which timm's validate.py takes with --use-ema" if averaged else ""
        )
        raise RecoupError(
            f"{path} holds several state dicts that differ, under {', '.join(full)}: say which: "
            f"{' or '.join(f'{path}#{name}' for name in full)}{said}"
        )
    return next(iter(full or nests), None)


def _weighs(value: Mapping[Any, Any], least: int = 1) -> bool:
    """Whether there are tensors in a mapping, or where a training script puts them in it; ``least``: one of so many
    elements."""
    inner = [value[name] for name in (*NESTS, *AVERAGED) if isinstance(value.get(name), Mapping)]
    held = any(isinstance(one, Tensor) and one.numel() >= least for one in value.values())
    return held or any(_weighs(one, least) for one in inner)


def _alike(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    """Whether two state dicts are the same to the bit."""
    return one.keys() == other.keys() and all(
        isinstance(value, Tensor) and isinstance(other[name], Tensor) and _same_bits(value, other[name])
        for name, value in one.items()
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape or one.layout != other.layout:
        return False
    if one.layout != torch.strided or one.is_quantized:
        return torch.equal(one, other)
    first, second = (x.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8) for x in (one, other))
    return torch.equal(first, second)  # of floats it is not: NaN equals no NaN


def _without_prefixes(tensors: dict[str, Tensor], own: Mapping[str, object]) -> dict[str, Tensor]:
    """Drop a prefix that every name in the file has and no name in the model has."""
    if COUNT in tensors and COUNT not in own:
        tensors = {name: tensor for name, tensor in tensors.items() if name != COUNT}
    for _ in range(4):  # module._orig_mod.module. and the like: bounded, each round drops one
        for prefix in PREFIXES:
            foreign = not any(name.startswith(prefix) for name in own)
            if foreign and all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    # Of a network that was an attribute, as of a LightningModule: any name, where the rest is the model's to a letter.
    first = next(iter(tensors), "").partition(".")[0] + "."
    if all(name.startswith(first) for name in tensors):
        within = {name.removeprefix(first): tensor for name, tensor in tensors.items()}
        lacking = {name for name in own if name not in within and not name.endswith("num_batches_tracked")}
        if within.keys() <= own.keys() and not lacking:
            return within
    return tensors


def _mismatches(tensors: dict[str, Tensor], own: Mapping[str, object]) -> list[str]:
    needed = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    missing = [name for name in needed if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in needed]
    shared = [(name, tensors[name], needed[name]) for name in tensors if name in needed]
    shapes = [
        f"{name} is {list(theirs.shape)} in the file and {list(ours.shape)} in the model"
        for name, theirs, ours in shared
        if theirs.shape != ours.shape
    ]
    # Copying would turn integer codes into floats, or drop imaginary parts, without a word.
    kinds = [
        f"{name} is {theirs.dtype} in the file and {ours.dtype} in the model"
        for name, theirs, ours in shared
        if theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex() != ours.is_complex()
    ]
    labelled = {"missing": missing, "unexpected": unexpected, "shape": shapes, "type": kinds}
    return [f"{label}: {_some(names)}" for label, names in labelled.items() if names]


def _some(names: list[str]) -> str:
    shown = ", ".join(str(name) for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
