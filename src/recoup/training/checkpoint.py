"""A training run on disk: one safetensors file with its JSON inside, replaced whole.

Weights, buffers, what repairs fitted to emulated layers (gains), optimiser state and the random generators' states are
tensors; where the run stands, its configuration and its history are JSON in the file's metadata. One file cannot be
half of one run and half of another.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.network.emulated import Emulated, emulated_layers
from recoup.storage.statefile import Difference, StateFile

FILE = "checkpoint.safetensors"
SCHEMA = "2"


def state_file(folder: Path, identity: Mapping[str, Any]) -> StateFile:
    """Of a run's `tensors` and its progress, which is JSON.

    Its ``read`` raises a RecoupError for a file that is cut off or foreign, and for one of another run.
    """
    return StateFile(folder / FILE, identity, _encoded, _decoded, _damaged, _foreign)


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that decides a run's next step."""
    found = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, layer in emulated_layers(model).items():
        found |= {f"{extra}.{name}": value for extra, value in layer.extra_tensors().items() if _decides(layer, extra)}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if value is not None:
                found[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    found["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        found["random.cuda"] = torch.cuda.get_rng_state()
    return found


def _decides(layer: Emulated, extra: str) -> bool:
    """Whether an extra has to be kept: what was measured, training leaves as it finds it."""
    return extra not in layer.measured


def restore(kept: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back: the next step is the one an uninterrupted run would have taken."""
    for layer in emulated_layers(model).values():  # the run's own come with its weights: none is lost, and none stays
        layer.take_extras({})
    model.load_state_dict({n.removeprefix("model."): t for n, t in kept.items() if n.startswith("model.")})
    for name, layer in emulated_layers(model).items():
        layer.take_extras({extra: kept.get(f"{extra}.{name}") for extra in layer.travelling if _decides(layer, extra)})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in kept.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(kept["random.cpu"])
    if "random.cuda" in kept and torch.cuda.is_available():
        torch.cuda.set_rng_state(kept["random.cuda"])


def _encoded(state: tuple[dict[str, Tensor], dict[str, Any]], identity: Mapping[str, Any]) -> bytes:
    found, progress = state
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}
    return save(plain, {"schema": SCHEMA, "progress": json.dumps({**progress, "identity": identity})})


def _decoded(path: Path) -> tuple[tuple[dict[str, Tensor], dict[str, Any]], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("schema") != SCHEMA:
            raise RecoupError(f"{path}: no training checkpoint of this recoup")
        progress = json.loads(metadata["progress"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return (found, progress), progress.pop("identity")


def _damaged(path: Path, error: Exception) -> str:
    return f"{path}: cut off or foreign ({error})"


def _foreign(path: Path, different: list[Difference]) -> str:
    name, before, now = different[0]
    if name.startswith("layers."):
        name = f"the config of layer {name.removeprefix('layers.')!r}"
    hint = "give the model as it was at the start, " if name == "weights" else ""
    return (
        f"{path} is another run: {name.removeprefix('settings.')} was {before!r} and is {now!r}; {hint}choose another "
        "folder, or delete it to start anew"
    )
