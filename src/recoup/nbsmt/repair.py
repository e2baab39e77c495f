"""What wins the accuracy back from NB-SMT, or spends speed on it.

In the order in which they belong: `reorder_` (which channels share a multiplier; free at run time), `throttle_` (fewer
threads where it hurts), then `correct_bias_` or, for networks with batch norm, `recoup.recalibrate_`.
"""

from recoup.nbsmt.bias import correct_bias_
from recoup.nbsmt.reorder import reorder_
from recoup.nbsmt.throttle import Throttling, plan_throttling, throttle_

__all__ = ["Throttling", "correct_bias_", "plan_throttling", "reorder_", "throttle_"]
