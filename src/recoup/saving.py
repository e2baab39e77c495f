"""A network with its hardware and repairs in one file: `save` and `load`.

The file is a safetensors file that is a correct float checkpoint: parameters and buffers stand under their own names as
`recoup.restore_` would leave them. Repaired statistics, gains, corrections, orders and scales are extras
``recoup.<layer>.<extra>``; the header holds the layer map, the ledger and versions as JSON. Nothing in it is code.
"""

import ast
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from recoup.emulate import emulate_, restore_
from recoup.errors import RecoupError
from recoup.fields import is_number, location
from recoup.grammar import parse_config, written
from recoup.models import load as load_model
from recoup.models.language import CHARGPT
from recoup.models.transformer import CharGPT, of_sizes
from recoup.network import ledger
from recoup.network.checks import is_module
from recoup.network.emulated import Emulated, emulated_layers
from recoup.network.scales import MEASURED, is_scale
from recoup.policy import Policy
from recoup.storage.files import write_atomically
from recoup.storage.kinds import REMEDIES, kind_of
from recoup.storage.names import renamed
from recoup.version import __version__

FOLDER, NAME = "hf:", "recoup.safetensors"
EXTRA = "_extra_state"  # how torch calls what get_extra_state gives
HEADER, PREFIX, BEFORE = "recoup", "recoup.", "recoup/before/"  # no module has a slash in its name
FORMAT, UNSIGNED_FORMAT = 2, 1  # a file without signed activation codes is of the first, which older versions read


def save(model: nn.Module, path: str | Path) -> None:
    """Write a network with its hardware, scales and repairs, whole or not at all. It stays as it is.

    Where ``path`` is a folder, such as save_pretrained's, the file is recoup.safetensors in it.

    Raises:
        RecoupError: no module, a config whose text is not read back, or a path that cannot be written.

    Warns:
        RecoupWarning: repairs that were fitted for other weights or another config; they are saved as they are.
    """
    is_module(model, "save")
    path = location("save", "path", path)
    ledger.warn_stale(model, "save")
    tensors: dict[str, Any] = {n: value for n, value in model.state_dict().items() if isinstance(value, Tensor)}
    taken = next((name for name in tensors if name.startswith(PREFIX)), None)
    if taken is not None:
        raise RecoupError(f"save: the network's own {taken!r} stands where recoup's extras do: rename that module")
    for name, module, entry in ledger.restorable(model):  # the last step first: what was before the first remains
        for own in entry.after:
            tensors[f"{PREFIX}{name}.{own}"] = ledger.tensor(module, own)
            tensors[_joined(name, own)] = entry.before[own]
    tensors = {name: value for name, value in tensors.items() if value is not None}
    for name, layer in emulated_layers(model).items():
        extras = layer.extra_tensors()
        tensors |= {f"{PREFIX}{name}.{n}": value for n, value in extras.items() if n not in layer.measured}
    scales = {n: float(s) for n, m in model.named_modules() if (s := getattr(m, "activation_scale", None)) is not None}
    zeros = {n: int(z) for n, m in model.named_modules() if n in scales and (z := getattr(m, "activation_zero", None))}
    operands = {n: list(s) for n, m in model.named_modules() if (s := getattr(m, "operand_scales", None)) is not None}
    kept, before = _ledger(model)
    header = {
        "format": FORMAT if zeros else UNSIGNED_FORMAT,
        "layers": {name: written(config, f"save: layer {name!r}") for name, config in Policy.of(model).items()},
        "scales": scales,
        **({"zeros": zeros} if zeros else {}),
        **({"operands": operands} if operands else {}),
        "trained": [name for name, layer in emulated_layers(model).items() if layer.trained],
        "sights": {name: sight[1:] for name, layer in emulated_layers(model).items() if (sight := layer.witness)},
        "notes": {name: note for name, layer in emulated_layers(model).items() if (note := layer.note())},
        "extra_state": _extra_state(model),
        **_language(model),
        "ledger": kept,
        "recoup": __version__,
        "torch": torch.__version__,
    }
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in (tensors | before).items()}
    try:
        write_atomically(_file(path), to_bytes(plain, {HEADER: json.dumps(header)}))
    except OSError as error:
        raise RecoupError(f"save: {path} cannot be written ({error.strerror})") from None


def load(path: str | Path, model: nn.Module | str | None = None, **options: Any) -> Any:
    """Give a float network the weights, hardware and repairs of a file that `save` wrote.

    Evaluating it gives what evaluating the saved network gave, bit for bit.

    Args:
        path: the file; ``FOLDER`` and ``hf:FOLDER`` are the file recoup.safetensors in it.
        model: a float network of the same architecture, or the text of one (``resnet20``, ``package.module:factory``);
            None: that of ``hf:FOLDER``. Its names may differ from the file's by one common prefix, which is said. A
            chargpt's sizes and alphabet are those that the file keeps.
        options: keyword arguments of the model's factory.

    Returns:
        The same model.

    Raises:
        RecoupError: no such file, a damaged one or none of ours, a newer format; a model that is emulated already or
            whose names, shapes or dtypes differ; hardware of a wing that is not registered. The model is then as it
            was.

    Warns:
        RecoupWarning: names that differ by a prefix.
    """
    if model is None and str(path).startswith(FOLDER):
        model = str(path)
    network: Any = _built(model, path, options) if isinstance(model, str) else model
    is_module(network, "load")
    path = location("load", "path", path)
    if emulated_layers(network):
        raise RecoupError("load: the model is emulated already: restore_ it first")
    header, tensors = read(path)
    alphabet = _alphabet(network, header, path)
    weights = {name: value for name, value in tensors.items() if not name.startswith((PREFIX, BEFORE))}
    own, extra = network.state_dict(), header.get("extra_state", {})
    rename = renamed(_shaped(weights | extra), _shaped(own), f"load: {path}")
    _check_types(weights, own, rename, path)
    before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in own.items()}
    scales = {module: {n: module.__dict__.get(n) for n in MEASURED} for module in network.modules()}
    try:
        network.load_state_dict({rename(name): value for name, value in (weights | extra).items()})
        _fill(network, header, tensors, rename)
    except BaseException as error:
        restore_(network)
        network.load_state_dict(before)
        for module, measured in scales.items():
            for name, value in measured.items():
                module.__dict__.pop(name, None)
                if value is not None:
                    module.__dict__[name] = value
        if isinstance(error, RecoupError) or not isinstance(error, Exception):
            raise
        raise RecoupError(f"load: {path} does not fit {type(network).__name__}: {error}") from error
    if alphabet:
        network.alphabet = alphabet
    return network


def _built(spec: str, path: Any, options: Mapping[str, Any]) -> nn.Module:
    """The float network that a text names; a chargpt without options has the sizes that the file keeps."""
    if spec in CHARGPT and not options:
        kept = read(location("load", "path", path))[0].get("language")
        if kept is not None:
            return of_sizes(kept, f"load: {path}")
    return load_model(spec, **options)


def _language(model: nn.Module) -> dict[str, Any]:
    """The alphabet of a network of characters, without which its numbers mean nothing, and a chargpt's sizes."""
    alphabet = next((found for one in model.modules() if (found := getattr(one, "alphabet", None))), None)
    if not isinstance(alphabet, str):
        return {}
    sizes = next((one.sizes for one in model.modules() if isinstance(one, CharGPT)), None)
    return {"language": {"alphabet": alphabet, **({} if sizes is None else {"sizes": sizes})}}


def _alphabet(network: nn.Module, header: Mapping[str, Any], path: Any) -> str:
    """The alphabet that a file keeps for a network, "" where it keeps none.

    Raises:
        RecoupError: the network has another: the same numbers would be other characters.
    """
    kept = header.get("language", {})
    found = kept.get("alphabet", "") if isinstance(kept, dict) else None
    if not isinstance(found, str):
        raise RecoupError(f"load: {path} has the alphabet {found!r}; a text expected")
    own = getattr(network, "alphabet", "")
    if found and own and isinstance(own, str) and own != found:
        raise RecoupError(f"load: {path} is of a network of the alphabet {found!r}; this one reads {own!r}")
    return found


def _file(path: str | Path) -> Path:
    """The file itself; in a folder, such as that of save_pretrained, the one that has its name there."""
    place = Path(str(path).removeprefix(FOLDER))
    return place / NAME if place.is_dir() else place


def _check_types(
    weights: Mapping[str, Tensor], own: Mapping[str, Any], rename: Callable[[str], str], path: str | Path
) -> None:
    """Refuse a model of another dtype: its weights would be rounded, and not be those that were saved."""
    for name, value in weights.items():
        there = own.get(rename(name))
        if isinstance(there, Tensor) and there.dtype != value.dtype:
            raise RecoupError(
                f"load: {path}: {name!r} is {value.dtype} in the file and {there.dtype} in the model: convert the "
                f"model first, as in model.to({value.dtype})"
            )


def _shaped(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict as names and shapes; modules' extra state, which may have any, as of one shape."""
    return {n: torch.empty(0) if n.endswith(EXTRA) or not isinstance(v, Tensor) else v for n, v in state.items()}


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file that `save` wrote; errors as `load`."""
    try:
        with safe_open(_file(path), "pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            if text is None:
                raise RecoupError(f"load: {path} is a plain checkpoint, not written by recoup.save")
            header = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dict
    except RecoupError:
        raise
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        kind = kind_of(_file(path))
        if kind is not None:
            raise RecoupError(
                f"load: {path} is {kind}, not written by recoup.save(model, ...), which keeps hardware and repairs; "
                f"{REMEDIES[kind].replace('FILE', repr(str(path)))}"
            ) from None
        if not _file(path).exists():
            raise RecoupError(f"load: {_file(path)}: no such file") from None
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
        zero = header.get("zeros", {}).get(name, 0)
        if not is_number(zero) or zero not in (0, 128):
            raise RecoupError(f"load: layer {name!r} has the activation zero {zero!r}; it must be 0 or 128")
        module(name).activation_scale = scale  # type: ignore[assignment]
        module(name).activation_zero = int(zero)  # type: ignore[assignment]
    for name, scales in header.get("operands", {}).items():
        if not isinstance(scales, list) or len(scales) != 4 or not all(map(is_scale, scales)):
            raise RecoupError(
                f"load: attention {name!r} has the operand scales {scales!r}; four numbers above 0 expected"
            )
        module(name).operand_scales = tuple(scales)  # type: ignore[assignment]
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
        _fill_tensors(target, {n: v for n, v in values.items() if n not in getattr(target, "travelling", ())})
    for name, entries in header["ledger"].items():
        for entry in entries:
            ledger.write(module(name), _entry(module(name), name, entry, tensors))
    for name in header.get("trained", []):
        module(name).trained = True  # type: ignore[assignment]
    _fill_sights(model, {rename.module(name): sight for name, sight in header.get("sights", {}).items()})
    ledger.watch_loading(model)


def _fill_tensors(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Statistics and weights as repairs left them."""
    with torch.no_grad():
        for name, value in values.items():
            own = ledger.tensor(module, name)
            if own is not None:
                own.copy_(value)
            elif name in module._parameters:  # the float network has none
                module.register_parameter(name, nn.Parameter(value.clone()))
            else:
                raise RecoupError(f"load: {type(module).__name__} has no {name!r}, which a repair wrote")


def _fill_sights(model: nn.Module, sights: Mapping[str, list[str]]) -> None:
    """What every layer was when statistics were repaired; a file without it: as it is."""
    repaired = ledger.found(model, "statistics")
    witness = ledger.Witness([norm for norm, _ in repaired.values()])
    for name, layer in emulated_layers(model).items() if repaired else ():
        kept = sights.get(name) or [ledger.hardware_digest(layer), ledger.weights_digest(layer)]
        layer.witness = ledger.Sight(witness, *kept)


def _extra_state(model: nn.Module) -> dict[str, Any]:
    """What modules keep by get_extra_state, where it is plain values; tensors stand among the others.

    Raises:
        RecoupError: anything else, which only a pickle would hold.
    """
    found = {name: value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}
    for name, value in found.items():
        try:
            plain = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError):
            plain = False
        if not plain:
            raise RecoupError(
                f"save: {name}: get_extra_state of a module gives a {type(value).__name__} that JSON does not hold; a "
                "file without code takes tensors, numbers, text, lists and maps with text as keys"
            )
    return found


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
            fields["after"] = list(entry.after)
            if not ledger.unchanged(module, entry):
                fields["changed"] = True
            kept.setdefault(name, []).append(fields)
    return kept, tensors


def _entry(module: nn.Module, name: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ledger.Entry:
    device = next((p.device for p in module.parameters(recurse=False)), None)
    before: dict[str, Any] = {}
    for attribute, text in fields["before"].items():
        value = tensors.get(_before(name, fields["slot"], attribute))
        before[attribute] = value.to(device) if value is not None else None if text is None else _plain(text)
    written = fields.get("after", ledger.BUFFERS if fields["stage"] == "statistics" else ())
    held = {own: ledger.tensor(module, own) for own in written}
    after = {own: value.detach().clone() for own, value in held.items() if value is not None}
    if fields.get("changed"):  # since the repair: what it wrote is no longer there
        after = {own: torch.full_like(v, torch.nan if v.is_floating_point() else -1) for own, v in after.items()}
    kept = {key: value for key, value in fields.items() if key != "changed"}
    return ledger.Entry(**{**kept, "before": before, "after": after})


def _plain(text: str) -> Any:
    """A plain value or a config from its repr."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # a config, or what is too deep to be one
        return parse_config(text)


def _before(name: str, slot: str, attribute: str) -> str:
    return f"{BEFORE}{name}.{slot}.{attribute}"


def _joined(name: str, buffer: str) -> str:
    return f"{name}.{buffer}" if name else buffer
