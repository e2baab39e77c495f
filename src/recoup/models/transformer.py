"""A small character-level GPT: pre-LayerNorm blocks, learned positions, GELU, attention products by name."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.fields import location
from recoup.models.attention import AttentionProducts
from recoup.models.blocks import check_sizes
from recoup.models.weights import load_weights_

SIZES = ("layers", "width", "heads", "context")
"""Of a `CharGPT`, beside its alphabet."""


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention = AttentionProducts()
        self.proj = nn.Linear(width, width)
        self.ln2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        q, k, v = (
            part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(width, dim=-1)
        )
        mixed = self.attention(q, k, v, causal=True).transpose(1, 2).reshape(B, T, width)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))


class CharGPT(nn.Module):
    """Next-character logits [B, T, characters] from characters [B, T].

    Args:
        characters: size of the alphabet.
        layers, width, heads, context: of the network; ``width`` is a multiple of ``heads``.
    """

    def __init__(
        self, characters: int = 65, layers: int = 4, width: int = 96, heads: int = 4, context: int = 64
    ) -> None:
        super().__init__()
        check_sizes("chargpt", characters=characters, layers=layers, width=width, heads=heads, context=context)
        if width % heads:
            raise RecoupError(f"chargpt: width {width} must be a multiple of heads {heads}")
        self.context = context
        self.sizes = {"layers": layers, "width": width, "heads": heads, "context": context}
        self.alphabet = ""  # of a checkpoint: a character's number is its place
        self.tok = nn.Embedding(characters, width)
        self.pos = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.lnf = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the character after each."""
        if tokens.dim() != 2 or tokens.shape[1] > self.context:
            raise RecoupError(f"chargpt: tokens {list(tokens.shape)} must be [B, T] with T up to {self.context}")
        x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.lnf(x))


def chargpt(characters: int = 65, layers: int = 4, width: int = 96, heads: int = 4, context: int = 64) -> CharGPT:
    """A `CharGPT` with fresh weights."""
    return CharGPT(characters, layers, width, heads, context)


def load_chargpt(path: str | Path) -> tuple[CharGPT, str]:
    """The network and the alphabet of a checkpoint with ``state_dict`` and ``config``, or the float network of a file
    of `recoup.save`, which keeps alphabet and sizes too.

    Raises:
        RecoupError: no such checkpoint.
    """
    path = location("load_chargpt", "path", path)
    saved = _saved(path)
    if saved is not None:
        model = of_sizes(saved, f"{path}")
        return load_weights_(model, path).eval(), model.alphabet
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        state, config = content["state_dict"], content["config"]
        alphabet = "".join(config["chars"])
        sizes = {"layers": "layers", "width": "d", "heads": "heads", "context": "ctx"}
        model = CharGPT(len(alphabet), **{name: int(config[key]) for name, key in sizes.items()})
        model.load_state_dict(state)
    except (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, UnpicklingError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecoupError(f"{path}: no checkpoint of a chargpt that holds its alphabet ({why})") from None
    model.alphabet = alphabet
    return model.eval(), alphabet


def of_sizes(kept: Any, purpose: str) -> CharGPT:
    """A network of the alphabet and the sizes that a file of `recoup.save` keeps, with fresh weights.

    Raises:
        RecoupError: they are not those of a chargpt, headed by ``purpose``.
    """
    try:
        alphabet, sizes = kept["alphabet"], {name: int(kept["sizes"][name]) for name in SIZES}
        model = CharGPT(len(alphabet), **sizes)
    except (KeyError, TypeError, ValueError):
        raise RecoupError(f"{purpose}: no file of a chargpt that holds its alphabet") from None
    model.alphabet = alphabet
    return model


def _saved(path: Path) -> Any:
    """What a file of `recoup.save` says of a text's network; None of any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("recoup")
            header = {} if text is None else json.loads(text)
    except (OSError, SafetensorError, ValueError, RecursionError):
        return None
    return None if text is None else header.get("language", {}) if isinstance(header, dict) else {}
