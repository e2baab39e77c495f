"""A folder that belongs to one run: made, checked to be that run's, or emptied of another's."""

from collections.abc import Callable, Iterable
from pathlib import Path

from recoup.errors import RecoupError
from recoup.storage.files import write_atomically


def make(folder: Path) -> None:
    """Make a folder, and those above it, where there is none.

    Raises:
        RecoupError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if folder.is_file() else error.strerror
        raise RecoupError(f"{folder}: cannot be made a folder for results ({why})") from None


def reserve(
    folder: Path,
    record: str,
    text: str,
    stays: Callable[[str], bool],
    *,
    results: Iterable[str] = (),
    overwrite: bool = False,
) -> None:
    """Make a folder that of one run, whose record of what was asked for lies in it.

    Args:
        folder: made if it is not there.
        record: the name of the record's file.
        text: its content for this run.
        stays: asked about a record that is there already: raises a RecoupError if it is another run's, else whether it
            stays as it is; otherwise ``text`` takes its place.
        results: names of the files that a run leaves.
        overwrite: the folder is this run's whatever it holds: ``results`` go, and no record is asked about.

    Raises:
        RecoupError: the folder cannot be made, or is another run's.
    """
    make(folder)
    path = folder / record
    if overwrite:
        for name in results:
            (folder / name).unlink(missing_ok=True)
    elif path.exists() and stays(path.read_text("utf-8", "replace")):
        return
    write_atomically(path, text)
