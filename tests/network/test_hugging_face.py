"""Which modules ask transformers' attention interface, whatever their forwards are made of."""

import functools
import operator
import sys
import types

import pytest
from torch import nn

from recoup.network.hugging_face import asks_interface

ALL_ATTENTION_FUNCTIONS = {}


def asking(self, x):
    return ALL_ATTENTION_FUNCTIONS["eager"](x)


def wrapping(inner):
    def forward(self, x):
        return inner(x)

    return functools.update_wrapper(forward, inner)


@pytest.mark.parametrize(
    ("forward", "asks"),
    [(asking, True), (wrapping(asking), True), (wrapping(operator.neg), False), (wrapping(len), False), (len, False)],
)
def test_what_asks_the_interface(monkeypatch, forward, asks):
    """What a decorator wraps need be no function of Python."""
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    assert asks_interface(type("Attention", (nn.Module,), {"forward": forward})) is asks
