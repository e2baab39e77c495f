"""What every process of `recoup train --ranks N` runs: ``python -m recoup.training.process FOLDER``."""

import json
import sys
from pathlib import Path

from recoup.training.run import RECIPE, TrainingRecipe, run_training


def main(folder: Path) -> None:
    """Run the recipe that a folder keeps, as one rank of torchrun."""
    recipe = TrainingRecipe.build(json.loads((folder / RECIPE).read_text("utf-8")))
    run_training(recipe, folder, progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
