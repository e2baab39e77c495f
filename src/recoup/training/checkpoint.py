"""A training run on disk: one safetensors file with its JSON inside, replaced whole.

Weights, buffers, gains of LBA layers, optimiser state and the random generators' states are tensors; where the run
stands, its configuration and its history are JSON in the file's metadata. One file cannot be half of one run and half
of another.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.lba.layers import LBALayer
from recoup.network.emulated import emulated_layers
from recoup.storage.files import write_atomically

FILE = "checkpoint.safetensors"
SCHEMA = "2"


def write(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Keep a run; ``progress`` is JSON."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"gain.{name}": layer.gain for name, layer in _layers(model).items() if layer.gain is not None}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, save(plain, {"schema": SCHEMA, "progress": json.dumps(progress)}))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors and progress.

    Raises:
        RecoupError: a file that is cut off, foreign or of another version.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("schema") != SCHEMA:
                raise RecoupError(f"{path}: no training checkpoint of this recoup")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["progress"])  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, RecoupError):
            raise
        raise RecoupError(f"{path}: cut off or foreign ({error})") from None


def _layers(model: nn.Module) -> dict[str, LBALayer]:
    """The layers that may have a gain, which no state_dict has as a tensor."""
    return {name: layer for name, layer in emulated_layers(model).items() if isinstance(layer, LBALayer)}


def restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back: the next step is the one an uninterrupted run would have taken."""
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    for name, layer in _layers(model).items():
        gain = tensors.get(f"gain.{name}")
        layer.gain = None if gain is None else gain.to(layer.weight.device)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
