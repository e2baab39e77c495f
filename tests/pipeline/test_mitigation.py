"""The value that says what is done against a delay: names, copies, ranges."""

import itertools
import math

import pytest

from recoup.errors import RecoupError
from recoup.pipeline import Mitigation
from recoup.pipeline.mitigation import NAMES

FIELDS = {
    "none": {},
    "stash": {"stash": True},
    "sc": {"compensation": 1.0},
    "lwpv": {"prediction": "velocity"},
    "lwpw": {"prediction": "weight"},
    "lwpv+sc": {"compensation": 1.0, "prediction": "velocity"},
    "lwpw+sc": {"compensation": 1.0, "prediction": "weight"},
    "spectrain": {"prediction": "spectrain"},
}
DEFAULTS = {
    "compensation": 0.0,
    "prediction": "none",
    "horizon": 1.0,
    "stash": False,
    "shrink": 1.0,
    "annealing": 0,
    "reach": "delay",
    "past": False,
}


def test_the_names_of_the_contract():
    assert list(NAMES) == list(FIELDS)
    for name, own in FIELDS.items():
        assert Mitigation.parse(name).to_dict() == {**DEFAULTS, **own}


@pytest.mark.parametrize(
    "how",
    [*NAMES.values(), Mitigation(compensation=0.5, prediction="weight", horizon=2.5, shrink=0.9, annealing=7)],
    ids=repr,
)
def test_comes_back_from_its_repr_and_from_plain_values(how):
    assert eval(repr(how), {"Mitigation": Mitigation}) == how  # noqa: S307
    assert Mitigation.from_dict(how.to_dict()) == how
    assert len({how, how.replace()}) == 1


def test_only_two_sayings_about_the_backward_pass_are_refused():
    for stash, past, prediction, alpha in itertools.product(
        (False, True), (False, True), DEFAULT_PREDICTIONS, (0.0, 1.0)
    ):
        fields = {"stash": stash, "past": past, "prediction": prediction, "compensation": alpha}
        if stash + past + (prediction == "spectrain") > 1:
            with pytest.raises(RecoupError, match="both say which weights the backward pass uses"):
                Mitigation(**fields)
        else:
            assert Mitigation(**fields).to_dict() == {**DEFAULTS, **fields}


def test_names_can_be_joined():
    assert Mitigation.parse("coasting+stash") == Mitigation(prediction="velocity", reach="coasting", stash=True)
    assert Mitigation.parse("past+sc") == Mitigation(compensation=1.0, past=True)
    assert Mitigation.parse("sc+lwpv") == Mitigation.parse("lwpv+sc")


DEFAULT_PREDICTIONS = ("none", "velocity", "weight", "spectrain")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compensation": -0.1}, "compensation must be a number from 0 to 100"),
        ({"compensation": math.nan}, "compensation=nan"),
        ({"compensation": True}, "compensation=True"),
        ({"compensation": "1"}, "compensation='1'"),
        ({"horizon": 101}, "horizon must be a number from 0 to 100"),
        ({"shrink": 0}, "shrink must be a number above 0 and at most 1"),
        ({"shrink": 1.1}, "shrink=1.1"),
        ({"shrink": math.nan}, "shrink=nan"),
        ({"annealing": -1}, "annealing=-1"),
        ({"annealing": 2.0}, "annealing=2.0"),
        ({"prediction": "lwp"}, "prediction must be one of 'none', 'velocity', 'weight', 'spectrain'"),
        ({"prediction": ["weight"]}, "prediction must be one of"),
        ({"stash": 1}, "stash must be True or False"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(RecoupError, match=message):
        Mitigation(**fields)


@pytest.mark.parametrize("name", ["lwp", "SC", "", None, ["sc"]])
def test_unknown_names(name):
    with pytest.raises(RecoupError, match="the names are none, stash, sc, lwpv"):
        Mitigation.parse(name)


def test_unknown_fields():
    with pytest.raises(RecoupError, match="unknown field 'alpha'"):
        Mitigation.from_dict({"alpha": 1})
