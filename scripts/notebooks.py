"""The notebooks of docs/notebooks, from their texts in jupytext's percent format; jupytext itself is not needed.

python scripts/notebooks.py     # writes an .ipynb beside every .py; a test holds the pairs against each other
"""

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
CELL = re.compile(r"^# %%(?P<markdown> \[markdown\])?\n(?P<body>.*?)(?=^# %%|\Z)", re.MULTILINE | re.DOTALL)


def cells(text: str) -> list[dict[str, Any]]:
    """The cells of a text."""
    found = []
    for number, match in enumerate(CELL.finditer(text)):
        body = match["body"].strip("\n")
        common = {"id": f"cell-{number}", "metadata": {}}
        if match["markdown"]:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
            found.append({"cell_type": "markdown", **common, "source": body.splitlines(keepends=True)})
        else:
            code = {"execution_count": None, "outputs": [], "source": body.splitlines(keepends=True)}
            found.append({"cell_type": "code", **common, **code})
    return found


def notebook(text: str) -> str:
    """A notebook without outputs, as Jupyter keeps it."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"jupytext": {"formats": "ipynb,py:percent"}, "kernelspec": kernel}
    whole = {"cells": cells(text), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1) + "\n"


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.py")):
        path.with_suffix(".ipynb").write_text(notebook(path.read_text("utf-8")), "utf-8")
