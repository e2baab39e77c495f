"""Files that are whole or not there."""

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from recoup.errors import RecoupError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NoSpaceError(RecoupError):
    """A file that does not fit: the disk is full, or a quota or a limit on the size of files is reached."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that whatever happens, ``path`` holds its old content or all of the new.

    Raises:
        NoSpaceError: it does not fit; the message names the file and what became of it.
        OSError: it cannot be written for another reason.
    """
    try:
        _write(path, content)
    except OSError as error:
        if error.errno not in FULL:
            raise
        kept = "it is as it was before" if path.exists() else "nothing of it is left"
        raise NoSpaceError(f"{path}: cannot be written ({os.strerror(error.errno)}); {kept}") from None


def write_once(path: Path, content: str | bytes) -> bool:
    """Write a file that is not there, whole; False where there is one, which stays, also one of the same moment.

    Raises:
        NoSpaceError, OSError: as `write_atomically`.
    """
    if path.exists():
        return False
    made = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    write_atomically(made, content)
    try:
        path.hardlink_to(made)
    except FileExistsError:
        return False
    finally:
        made.unlink(missing_ok=True)
    return True


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """Say what is kept elsewhere where a file does not fit."""
    try:
        yield
    except NoSpaceError as error:
        raise NoSpaceError(f"{error}; {kept()}") from None


def _write(path: Path, content: str | bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp gives 600; results are for others to read
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
