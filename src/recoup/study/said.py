"""Warnings of what is made once and used by many measurements."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from recoup.errors import RecoupWarning


class Said(list[str]):
    """recoup's warnings while something is made that is made once; whoever takes it from then on hears them too, so
    that the notes of a measurement do not depend on what was measured before it."""

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen, and pass on what was said."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        self[:] = [str(one.message) for one in caught if issubclass(one.category, RecoupWarning)]
        for one in caught:
            if not issubclass(one.category, RecoupWarning):
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def again(self) -> None:
        """Say it."""
        for text in self:
            warnings.warn(text, RecoupWarning, stacklevel=2)
