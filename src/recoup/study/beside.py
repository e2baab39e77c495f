"""What a study of another kind leaves in a folder beside a recipe's results: one JSON file, read back or refused."""

import json
from pathlib import Path
from typing import ClassVar, Self

from pydantic import ValidationError

from recoup.errors import RecoupError
from recoup.storage.files import write_atomically
from recoup.study.rows import Frozen


class Beside(Frozen):
    """Results that are a file of their own.

    Attributes:
        file: its name.
        what: what it holds, as in "not *a pipeline study*".
        again: how it is made anew, for the end of an error.
    """

    file: ClassVar[str]
    what: ClassVar[str]
    again: ClassVar[str] = ""

    def save(self, folder: Path) -> Path:
        """Write the file, whole or not at all."""
        path = folder / self.file
        write_atomically(path, json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The results of a folder; None where there are none.

        Raises:
            RecoupError: a file that cannot be read, is cut off, foreign or of another schema.
        """
        path = folder / cls.file
        try:
            return cls.model_validate_json(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RecoupError(f"{path}: cannot be read ({error.strerror})") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the whole"
            why = f"{place}: {first['msg']}"
        except ValueError as error:  # bytes that are no text
            why = str(error).splitlines()[0]
        raise RecoupError(f"{path}: not {cls.what} of this recoup ({why}){cls.again}")
