"""Networks of Hugging Face transformers from a local folder, as ``save_pretrained`` leaves it."""

from pathlib import Path
from typing import Any

from torch import nn

from recoup.errors import RecoupError

PREFIX = "hf:"


def from_folder(spec: str) -> nn.Module:
    """The network of ``hf:FOLDER``, of the class that its config.json names, with the folder's weights.

    Code that lies in the folder is neither run nor asked about.

    Raises:
        RecoupError: transformers is not installed; no such folder, or no network of transformers in it.
    """
    folder = Path(spec.removeprefix(PREFIX))
    if not folder.is_dir():
        raise RecoupError(f"model {spec!r}: {folder} is no folder; hf:FOLDER reads what save_pretrained wrote")
    try:
        import transformers
    except ImportError as error:
        raise RecoupError(f"model {spec!r}: needs transformers (pip install 'recoup[transformers]')") from error
    try:
        # Where nothing is said about trust, transformers asks on the terminal, and runs what lies there after a "y".
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise RecoupError(f"model {spec!r}: config.json names {config.architectures}, no class of transformers")
        found: Any = kind
        return found.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, RecoupError):
            raise
        raise RecoupError(f"model {spec!r}: {str(error).splitlines()[0]}") from error
