"""recoup: what cost-cutting neural-network hardware does to your network's accuracy, and how to win it back.

>>> import recoup as rc
>>> rc.calibrate_(model, batches)                       # doctest: +SKIP
>>> rc.emulate_(model, rc.NBSMT(threads=4))             # doctest: +SKIP
>>> rc.recalibrate_(model, batches)                     # doctest: +SKIP
>>> rc.evaluate(model, test_batches)                    # doctest: +SKIP
"""

from recoup import data, formats, lba, lightnorm, models, nbsmt, pipeline, wings
from recoup.calibrate import calibrate_
from recoup.emulate import emulate_, restore_
from recoup.errors import RecoupError, RecoupWarning
from recoup.evaluation import Accuracy, evaluate
from recoup.formats import BlockFloat, Float, Int, quantize
from recoup.lba import LBA
from recoup.lightnorm import LightNorm, LightNorm1d, LightNorm2d, LightNorm3d
from recoup.nbsmt import NBSMT, correct_bias_, reorder_, throttle_
from recoup.recalibrate import recalibrate_
from recoup.version import __version__

__all__ = [
    "LBA",
    "NBSMT",
    "Accuracy",
    "BlockFloat",
    "Float",
    "Int",
    "LightNorm",
    "LightNorm1d",
    "LightNorm2d",
    "LightNorm3d",
    "RecoupError",
    "RecoupWarning",
    "__version__",
    "calibrate_",
    "correct_bias_",
    "data",
    "emulate_",
    "evaluate",
    "formats",
    "lba",
    "lightnorm",
    "models",
    "nbsmt",
    "pipeline",
    "quantize",
    "recalibrate_",
    "reorder_",
    "restore_",
    "throttle_",
    "wings",
]
