"""A folder is one process's at a time: a lock that goes with the process, however it ends."""

import os
import time
from pathlib import Path

from recoup.errors import RecoupError

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None

WAIT = 5.0  # seconds: what a process that was just killed may need to be gone


class Lock:
    """A file that this process holds, alone or shared, until `release` or its end.

    Args:
        path: the file; its folder must be there. It stays when the lock is released.
        who: what asks for it, for the error.
        wait: seconds to wait for another.
        shared: together with others that share it, and with nobody who holds it alone.

    Raises:
        RecoupError: another process holds it.
    """

    def __init__(self, path: Path, who: str, wait: float = WAIT, *, shared: bool = False) -> None:
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        begun = time.monotonic()
        while not _taken(self._file, shared):
            if time.monotonic() - begun >= wait:
                self.release()
                raise RecoupError(
                    f"{who}: {path.parent} is in use by another run (process {_holder(path)}, which holds "
                    f"{path.name}); wait for it, or choose another folder"
                )
            time.sleep(0.05)
        os.ftruncate(self._file, 0)
        os.write(self._file, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let others have it."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.release()


def _holder(path: Path) -> str:
    return path.read_text("ascii", "replace").strip() or "unknown"


def _taken(file: int, shared: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
