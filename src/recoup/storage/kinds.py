"""What a file of torch's is, from its outside: nothing in it is run, and no object is made."""

import pickletools
import zipfile
from pathlib import Path

SCRIPT = "a TorchScript program"
EXPORTED = "a program of torch.export"
COMPILED = "a network that torch.compile gave, saved whole"
WHOLE = "a network saved whole"
CHECKPOINT = "a torch checkpoint"
REMEDIES = {
    SCRIPT: "torch.save(torch.jit.load(FILE).state_dict(), ...) writes its weights",
    EXPORTED: "torch.save(torch.export.load(FILE).state_dict, ...) writes its weights",
    COMPILED: "torch.save(model.state_dict(), ...) writes its weights",
    WHOLE: "torch.save(model.state_dict(), ...) writes its weights",
    CHECKPOINT: "--weights and load_weights_ read it",
}
"""How the weights of each are come by."""

_START = 1 << 16  # of a pickle; what it makes is named at once
_PLAIN = ("collections OrderedDict", "torch._utils ")  # of a state dict
_COMPILED = "torch._dynamo.eval_frame OptimizedModule"


def kind_of(path: Path) -> str | None:
    """What a file is, one of `REMEDIES`, or None where that is not known: damaged files, and those of torch before 1.6,
    are among them.

    >>> kind_of(Path("no-such-file.pt"))
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inner = {name.partition("/")[2] for name in names}
            if "constants.pkl" in inner:
                return SCRIPT
            if any(name.startswith("models/") or name == "serialized_exported_program.json" for name in inner):
                return EXPORTED
            pickled = next((name for name in names if name.partition("/")[2] == "data.pkl"), None)
            if pickled is None:
                return None
            with archive.open(pickled) as file:
                return _of_pickle(file.read(_START))
    except Exception:  # what is damaged makes zipfile, and what its parts are packed with, raise anything at all
        return None


def _of_pickle(start: bytes) -> str:
    """By what the outermost object is made with: a class by name, or not."""
    texts: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(start):
            if operation.name in ("GLOBAL", "STACK_GLOBAL"):
                made = str(argument) if operation.name == "GLOBAL" else " ".join(texts[-2:])
                return COMPILED if made == _COMPILED else CHECKPOINT if made.startswith(_PLAIN) else WHOLE
            if operation.name in ("EMPTY_DICT", "DICT", "EMPTY_LIST", "EMPTY_TUPLE", "MARK"):
                return CHECKPOINT
            if isinstance(argument, str):
                texts.append(argument)
    except ValueError:  # cut off
        pass
    return CHECKPOINT
