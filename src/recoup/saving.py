"""A network with its hardware and repairs in one file: `save` and `load`.

The file is a safetensors file that is a correct float checkpoint: parameters and buffers stand under their own names as
`recoup.restore_` would leave them. Repaired statistics, gains, corrections, orders and scales are extras
``recoup.<layer>.<extra>``; the header holds the layer map, the ledger and versions as JSON. Nothing in it is code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from recoup.emulate import emulate_, restore_
from recoup.errors import RecoupError
from recoup.grammar import written
from recoup.models import load as load_model
from recoup.network import ledger
from recoup.network.emulated import Emulated, emulated_layers
from recoup.policy import Policy
from recoup.storage.files import write_atomically
from recoup.storage.names import renamed
from recoup.version import __version__

HEADER, PREFIX, BEFORE, FORMAT = "recoup", "recoup.", "recoup/before/", 1  # no module has a slash in its name


def save(model: nn.Module, path: str | Path) -> None:
    """Write a network with its hardware, scales and repairs, whole or not at all. It stays as it is.

    Raises:
        RecoupError: no module, a config whose text is not read back, or a path that cannot be written.

    Warns:
        RecoupWarning: repairs that were fitted for other weights or another config; they are saved as they are.
    """
    if not isinstance(model, nn.Module):
        raise RecoupError(f"save: model must be a torch.nn.Module; got {type(model).__name__}")
    ledger.warn_stale(model, "save")
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    taken = next((name for name in tensors if name.startswith(PREFIX)), None)
    if taken is not None:
        raise RecoupError(f"save: the network's own {taken!r} stands where recoup's extras do: rename that module")
    for name, (norm, entry) in ledger.restorable(model).items():
        for buffer, value in ledger.statistics(norm).items():
            tensors[f"{PREFIX}{name}.{buffer}"] = value
            tensors[_joined(name, buffer)] = entry.before[buffer]
    for name, layer in emulated_layers(model).items():
        extras = layer.extra_tensors()
        tensors |= {f"{PREFIX}{name}.{n}": value for n, value in extras.items() if n not in layer.measured}
    scales = {n: float(s) for n, m in model.named_modules() if (s := getattr(m, "activation_scale", None)) is not None}
    kept, before = _ledger(model)
    header = {
        "format": FORMAT,
        "layers": {name: written(config, f"save: layer {name!r}") for name, config in Policy.of(model).items()},
        "scales": scales,
        "trained": [name for name, layer in emulated_layers(model).items() if layer.trained],
        "ledger": kept,
        "recoup": __version__,
        "torch": torch.__version__,
    }
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in (tensors | before).items()}
    try:
        write_atomically(Path(path), to_bytes(plain, {HEADER: json.dumps(header)}))
    except OSError as error:
        raise RecoupError(f"save: {path} cannot be written ({error.strerror})") from None


def load(path: str | Path, model: nn.Module | str) -> Any:
    """Give a float network the weights, hardware and repairs of a file that `save` wrote.

    Evaluating it gives what evaluating the saved network gave, bit for bit.

    Args:
        path: the file.
        model: a float network of the same architecture, or the text of one (``resnet20``, ``package.module:factory``).
            Its names may differ from the file's by one common prefix, which is said.

    Returns:
        The same model.

    Raises:
        RecoupError: no such file, a damaged one or none of ours, a newer format; a model that is emulated already or
            whose names or shapes differ; hardware of a wing that is not registered. The model is then as it was.

    Warns:
        RecoupWarning: names that differ by a prefix.
    """
    network: Any = load_model(model) if isinstance(model, str) else model
    if not isinstance(network, nn.Module):
        raise RecoupError(f"load: model must be a torch.nn.Module or its name; got {type(model).__name__}")
    if emulated_layers(network):
        raise RecoupError("load: the model is emulated already: restore_ it first")
    header, tensors = read(path)
    weights = {name: value for name, value in tensors.items() if not name.startswith((PREFIX, BEFORE))}
    own = network.state_dict()
    rename = renamed(weights, own, f"load: {path}")
    before = {name: value.clone() for name, value in own.items() if isinstance(value, Tensor)}
    scales = {module: module.__dict__.get("activation_scale") for module in network.modules()}
    try:
        network.load_state_dict({rename(name): value for name, value in weights.items()})
        _fill(network, header, tensors, rename)
    except BaseException as error:
        restore_(network)
        network.load_state_dict(before)
        for module, scale in scales.items():
            module.__dict__.pop("activation_scale", None)
            if scale is not None:
                module.__dict__["activation_scale"] = scale
        if isinstance(error, RecoupError) or not isinstance(error, Exception):
            raise
        raise RecoupError(f"load: {path} does not fit {type(network).__name__}: {error}") from error
    return network


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file that `save` wrote; errors as `load`."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            if text is None:
                raise RecoupError(f"load: {path} is a plain checkpoint, not written by recoup.save")
            header = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dict
    except RecoupError:
        raise
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise RecoupError(f"load: {path} cannot be read; cut off or foreign? ({error})") from None
    version = header.get("format") if isinstance(header, dict) else None
    if not isinstance(version, int) or version > FORMAT or not {"layers", "scales", "ledger"} <= header.keys():
        raise RecoupError(f"load: {path} has format {version!r}; this recoup {__version__} reads up to {FORMAT}")
    return header, tensors


def _fill(model: nn.Module, header: Mapping[str, Any], tensors: Mapping[str, Tensor], rename: Any) -> None:
    """Scales, hardware, extras, statistics and the ledger, in this order."""
    modules = dict(model.named_modules())

    def module(name: str) -> nn.Module:
        try:
            return modules[rename.module(name)]
        except KeyError:
            raise RecoupError(f"load: the model has no layer {rename.module(name)!r}") from None

    for name, scale in header["scales"].items():
        module(name).activation_scale = scale  # type: ignore[assignment]
    if header["layers"]:
        emulate_(model, Policy({rename.module(name): text for name, text in header["layers"].items()}))
    extras: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(PREFIX):
            layer, _, extra = key.removeprefix(PREFIX).rpartition(".")
            extras.setdefault(layer, {})[extra] = value
    for name, values in extras.items():
        target = module(name)
        if isinstance(target, Emulated):
            own = {n: v for n, v in values.items() if n in target.travelling}
            faults = [f"{name}: {extra} {fault}" for extra, v in own.items() if (fault := target.fault(extra, v))]
            if faults:
                raise RecoupError(f"load: {faults[0]}")
            target.take_extras(own)
        with torch.no_grad():
            for buffer in ledger.BUFFERS:
                if buffer in values:
                    getattr(target, buffer).copy_(values[buffer])
    for name, entries in header["ledger"].items():
        for entry in entries:
            ledger.write(module(name), _entry(module(name), name, entry, tensors))
    for name in header.get("trained", []):
        module(name).trained = True  # type: ignore[assignment]


def _ledger(model: nn.Module) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Tensor]]:
    """The entries as JSON, and the tensors among what was there before them."""
    kept: dict[str, list[dict[str, Any]]] = {}
    tensors: dict[str, Tensor] = {}
    for name, (module, own) in ledger.found(model).items():
        for entry in own:
            before = {}
            for attribute, value in entry.before.items():
                if isinstance(value, Tensor):
                    tensors[_before(name, entry.slot, attribute)] = value
                before[attribute] = None if isinstance(value, Tensor) or value is None else repr(value)
            fields = {"stage": entry.stage, "slot": entry.slot, "verb": entry.verb, "number": entry.number}
            fields |= {"images": entry.images, "weights": entry.weights, "config": entry.config, "before": before}
            if entry.stage == "statistics" and not ledger.same_statistics(module, entry):
                fields["changed"] = True
            kept.setdefault(name, []).append(fields)
    return kept, tensors


def _entry(module: nn.Module, name: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ledger.Entry:
    from recoup.grammar import parse_config

    device = next((p.device for p in module.parameters(recurse=False)), None)
    before: dict[str, Any] = {}
    for attribute, text in fields["before"].items():
        tensor = tensors.get(_before(name, fields["slot"], attribute))
        before[attribute] = tensor.to(device) if tensor is not None else None if text is None else parse_config(text)
    after = ledger.statistics(module) if fields["stage"] == "statistics" else {}
    if fields.get("changed"):  # since the repair: what it wrote is no longer there
        after = {buffer: torch.full_like(value, -1) for buffer, value in after.items()}
    kept = {key: value for key, value in fields.items() if key != "changed"}
    return ledger.Entry(**{**kept, "before": before, "after": after})


def _before(name: str, slot: str, attribute: str) -> str:
    return f"{BEFORE}{name}.{slot}.{attribute}"


def _joined(name: str, buffer: str) -> str:
    return f"{name}.{buffer}" if name else buffer
