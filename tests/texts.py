"""Small language models and texts, for tests: a character GPT with its checkpoint, a GPT-2 with its tokenizer."""

from pathlib import Path
from typing import Any

import torch

from recoup.models import chargpt

STORY = "the quick brown fox jumps over one lazy dog and a cat sat on that mat while rain fell on an old grey roof"
WORDS = STORY.split()
UNKNOWN = "<unk>"


def tale(words: int, seed: int = 0) -> str:
    """So many words of a small vocabulary, at random but never the same twice in a row."""
    picks = torch.randint(1, len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).cumsum(0)
    return " ".join(WORDS[int(pick) % len(WORDS)] for pick in picks) + ". "


def char_model(folder: Path, text: str, context: int = 8, steps: int = 0) -> Path:
    """The checkpoint of a chargpt for a text's characters, trained for some steps."""
    alphabet = sorted(set(text))
    torch.manual_seed(0)
    model = chargpt(len(alphabet), layers=1, width=16, heads=2, context=context)
    tokens = torch.tensor([alphabet.index(character) for character in text])
    starts = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        at = torch.randint(len(tokens) * 9 // 10 - context - 1, (32, 1), generator=starts) + torch.arange(context)
        loss = torch.nn.functional.cross_entropy(model(tokens[at]).flatten(0, 1), tokens[at + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    config = {"chars": alphabet, "layers": 1, "d": 16, "heads": 2, "ctx": context}
    torch.save({"state_dict": model.state_dict(), "config": config}, folder / "gpt.pt")
    return folder / "gpt.pt"


def save_tokenizer(folder: Path, text: str, **options: Any) -> int:
    """A word-level tokenizer of a text; how many tokens it has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([text], trainers.WordLevelTrainer(special_tokens=[UNKNOWN]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, **options)
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def gpt2(folder: Path, text: str, positions: int = 16, **changes: Any) -> Path:
    """A random GPT-2 of two layers with its tokenizer in a folder."""
    import transformers

    folder.mkdir(exist_ok=True)
    size = save_tokenizer(folder, text)
    torch.manual_seed(0)
    sizes = {"vocab_size": size, "n_positions": positions, "n_embd": 16, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **ends, **changes})).save_pretrained(folder)
    return folder
