"""torch's operations on lists of tensors, one call for all of them, which its stubs do not know."""

from typing import Any

import torch

each: Any = torch  # each._foreach_add_(tensors, others)
