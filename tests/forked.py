"""A check in a process that forks from a test's own, as it stands."""

import os
import warnings
from collections.abc import Callable


def begun(check: Callable[[], bool]) -> int:
    """The process that runs a check; it ends in 0 where that holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says where there are threads
        child = os.fork()
    if not child:
        good = False
        try:
            good = check()
        finally:
            os._exit(not good)
    return child


def held(child: int) -> bool:
    """Whether its check did, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
