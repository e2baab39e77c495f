"""Which cases of a test are in `make test` and which in `make slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, all marked slow but the ``quick`` ones; a quick one that is no case is a mistake."""
    quick, cases = list(quick), list(cases)
    assert all(case in cases for case in quick), [case for case in quick if case not in cases]
    return [
        case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
