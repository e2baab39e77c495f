"""recoup: what cost-cutting neural-network hardware does to your network's accuracy, and how to win it back.

>>> import recoup as rc
>>> rc.calibrate_(model, batches)                       # doctest: +SKIP
>>> rc.emulate_(model, rc.NBSMT(threads=4))             # doctest: +SKIP
>>> rc.recalibrate_(model, batches)                     # doctest: +SKIP
>>> rc.evaluate(model, test_batches)                    # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

from recoup.errors import RecoupError, RecoupWarning
from recoup.version import __version__

if TYPE_CHECKING:
    from recoup import data, formats, lba, lightnorm, models, nbsmt, pipeline, search, silicon, tensorcore, wings
    from recoup.calibrate import calibrate_
    from recoup.costs import Cost, cost
    from recoup.emulate import emulate_, restore_
    from recoup.evaluation import Accuracy, evaluate
    from recoup.formats import BlockFloat, Float, Int, quantize
    from recoup.lba import LBA
    from recoup.lightnorm import LightLayerNorm, LightNorm, LightNorm1d, LightNorm2d, LightNorm3d, LightRMSNorm
    from recoup.nbsmt import NBSMT, correct_bias_, reorder_, throttle_
    from recoup.policy import Policy
    from recoup.recalibrate import recalibrate_
    from recoup.repair import describe, repair_, undo_
    from recoup.saving import load, save
    from recoup.tensorcore import TensorCore

__all__ = [
    "LBA",
    "NBSMT",
    "Accuracy",
    "BlockFloat",
    "Cost",
    "Float",
    "Int",
    "LightLayerNorm",
    "LightNorm",
    "LightNorm1d",
    "LightNorm2d",
    "LightNorm3d",
    "LightRMSNorm",
    "Policy",
    "RecoupError",
    "RecoupWarning",
    "TensorCore",
    "__version__",
    "calibrate_",
    "correct_bias_",
    "cost",
    "data",
    "describe",
    "emulate_",
    "evaluate",
    "formats",
    "lba",
    "lightnorm",
    "load",
    "models",
    "nbsmt",
    "pipeline",
    "quantize",
    "recalibrate_",
    "reorder_",
    "repair_",
    "restore_",
    "save",
    "search",
    "silicon",
    "tensorcore",
    "throttle_",
    "undo_",
    "wings",
]

# Name -> the module that has it; a package is its own. They are imported when they are first used: torch takes seconds,
# and `recoup --help` needs none of it.
_PLACES = {
    "save": "recoup.saving",
    "load": "recoup.saving",
    "undo_": "recoup.repair",
    "repair_": "recoup.repair",
    "describe": "recoup.repair",
    "Policy": "recoup.policy",
    "Accuracy": "recoup.evaluation",
    "BlockFloat": "recoup.formats",
    "Float": "recoup.formats",
    "Int": "recoup.formats",
    "LBA": "recoup.lba",
    "LightLayerNorm": "recoup.lightnorm",
    "LightNorm": "recoup.lightnorm",
    "LightNorm1d": "recoup.lightnorm",
    "LightNorm2d": "recoup.lightnorm",
    "LightNorm3d": "recoup.lightnorm",
    "LightRMSNorm": "recoup.lightnorm",
    "TensorCore": "recoup.tensorcore",
    "tensorcore": "recoup.tensorcore",
    "search": "recoup.search",
    "silicon": "recoup.silicon",
    "NBSMT": "recoup.nbsmt",
    "calibrate_": "recoup.calibrate",
    "Cost": "recoup.costs",
    "correct_bias_": "recoup.nbsmt",
    "cost": "recoup.costs",
    "data": "recoup.data",
    "emulate_": "recoup.emulate",
    "evaluate": "recoup.evaluation",
    "formats": "recoup.formats",
    "lba": "recoup.lba",
    "lightnorm": "recoup.lightnorm",
    "models": "recoup.models",
    "nbsmt": "recoup.nbsmt",
    "pipeline": "recoup.pipeline",
    "quantize": "recoup.formats",
    "recalibrate_": "recoup.recalibrate",
    "reorder_": "recoup.nbsmt",
    "restore_": "recoup.emulate",
    "throttle_": "recoup.nbsmt",
    "wings": "recoup.wings",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'recoup' has no attribute {name!r}")
    place = _PLACES[name]
    module = importlib.import_module(place)
    found = module if place == f"recoup.{name}" else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
