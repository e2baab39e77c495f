"""The config validates itself, prints as it is written and survives YAML."""

import base64
import copy
import pickle

import pytest
import yaml
from hypothesis import given

from recoup.errors import RecoupError
from recoup.formats import Int
from recoup.nbsmt.config import NBSMT, POLICIES
from tests.nbsmt.strategies import configs


@given(configs)
def test_repr_can_be_pasted_back_and_yaml_round_trips(config):
    assert eval(repr(config), {"NBSMT": NBSMT}) == config  # noqa: S307 -- pasting back is the claim
    assert NBSMT.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize("threads", [0, 3, 8, -2, "2", 2.5, None, True])
def test_illegal_threads(threads):
    with pytest.raises(RecoupError, match=r"threads must be 1, 2 or 4"):
        NBSMT(threads=threads)


def test_unknown_policy_names_the_legal_ones():
    with pytest.raises(RecoupError) as error:
        NBSMT(policy="S+B")  # type: ignore[arg-type]
    assert all(policy in str(error.value) for policy in POLICIES)


def test_a_policy_that_is_not_separable_is_refused_with_the_reason():
    with pytest.raises(RecoupError, match="not separable"):
        NBSMT(policy="S+min(A,W)")  # type: ignore[arg-type]


@pytest.mark.parametrize(("field", "value"), [("rounding", "up"), ("pairing", "thirds")])
def test_other_fields(field, value):
    with pytest.raises(RecoupError, match=f"{field} must be one of"):
        NBSMT(**{field: value})


def test_unknown_field():
    with pytest.raises(RecoupError, match=r"'thread'.*threads, policy, rounding, pairing"):
        NBSMT.from_dict({"thread": 2})


def test_frozen_and_hashable():
    config = NBSMT()
    with pytest.raises(AttributeError):
        config.threads = 4  # type: ignore[misc]
    assert len({NBSMT(), NBSMT(), NBSMT(threads=4)}) == 2


@given(configs)
def test_the_same_unit_on_one_thread(config):
    assert config.single == config.replace(threads=1)
    assert config.single.single is config.single
    assert NBSMT.from_code(config.single.code) == config.single
    assert pickle.loads(pickle.dumps(config)).single == config.single


def test_the_code_is_readable_in_a_traced_graph():
    assert NBSMT().code == '{"threads": 2, "policy": "S+A", "rounding": "nearest", "pairing": "halves"}'


OLD = (
    "gASVawEAAAAAAABdlCiME3JlY291cC5uYnNtdC5jb25maWeUjAVOQlNNVJSTlCmBlF2UKIxLeyJ0aHJlYWRzIjogNCwgInBvbGlj"
    "eSI6ICJTK2FXIiwgInJvdW5kaW5nIjogInplcm8iLCAicGFpcmluZyI6ICJhZGphY2VudCJ9lEsEjARTK2FXlIwEemVyb5SMCGFk"
    "amFjZW50lGgDKYGUXZQojEt7InRocmVhZHMiOiAxLCAicG9saWN5IjogIlMrYVciLCAicm91bmRpbmciOiAiemVybyIsICJwYWly"
    "aW5nIjogImFkamFjZW50In2USwFoB2gIaAlOZWJlYmgDKYGUXZQojEt7InRocmVhZHMiOiAxLCAicG9saWN5IjogIlMrQSIsICJy"
    "b3VuZGluZyI6ICJuZWFyZXN0IiwgInBhaXJpbmciOiAiaGFsdmVzIn2USwGMA1MrQZSMB25lYXJlc3SUjAZoYWx2ZXOUTmViZS4="
)


def test_pickles_of_before_the_port_and_the_accumulator():
    """NBSMT(4, "S+aW", "zero", "adjacent") and NBSMT(1), by place; with fields of before, by name, to this day."""
    four, one = pickle.loads(base64.b64decode(OLD))
    assert four == NBSMT(4, "S+aW", "zero", "adjacent")
    assert one == NBSMT(1)
    for config in (four, one):
        assert config.code == NBSMT.from_dict(config.to_dict()).code
        assert config.single == config.eight_bit == config.replace(threads=1)
        assert repr(config) == repr(NBSMT.from_code(config.code))
    with pytest.raises(RecoupError, match="which is no state of a config: make the config anew"):
        NBSMT.__new__(NBSMT).__setstate__([2, "S+A"])


@given(configs)
def test_copies_are_of_values(config):
    limited = config.replace(accumulator=Int(18, overflow="wrap"))
    for other in (copy.copy(limited), copy.deepcopy(limited), pickle.loads(pickle.dumps(limited))):
        assert other == limited
        assert (other.code, other.single, other.eight_bit) == (limited.code, limited.single, limited.eight_bit)
    function, (values,) = limited.__reduce__()
    assert function(values) == limited
