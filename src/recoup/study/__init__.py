"""A recipe -> runs -> results, resumable: the main job of recoup as one call.

>>> from recoup.study import Recipe
>>> Recipe(model="resnet20", data="cifar10:data").calibration.seeds
(0, 1, 2)
"""

from recoup.study.configs import parse_config
from recoup.study.recipe import Recipe
from recoup.study.repairs import State
from recoup.study.results import Results
from recoup.study.runner import run
from recoup.tasks.shards import Shard

__all__ = ["Recipe", "Results", "Shard", "State", "parse_config", "run"]
