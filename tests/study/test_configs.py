import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup.errors import RecoupError
from recoup.nbsmt.config import NBSMT, PAIRINGS, POLICIES, ROUNDINGS
from recoup.study.configs import PRESETS, as_config, parse_config, title

CONFIGS = st.builds(
    NBSMT,
    threads=st.sampled_from((1, 2, 4)),
    policy=st.sampled_from(POLICIES),
    rounding=st.sampled_from(ROUNDINGS),
    pairing=st.sampled_from(PAIRINGS),
)


@settings(deadline=None)
@given(CONFIGS)
def test_every_repr_is_read_back(config):
    assert parse_config(repr(config)) == config
    assert as_config(config) is config


def test_presets_are_the_contracts():
    assert {"nbsmt-2t": NBSMT(threads=2), "nbsmt-4t": NBSMT(threads=4)} == PRESETS
    assert parse_config(" nbsmt-2t ") == NBSMT(threads=2)


def test_short_forms():
    assert parse_config("NBSMT(4, 'S')") == NBSMT(4, "S")
    assert parse_config('NBSMT(policy="aW")') == NBSMT(policy="aW")
    assert parse_config("NBSMT()") == NBSMT()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("NBSMT(threads=3)", "threads must be 1, 2 or 4"),
        ("NBSMT(policy='X')", "policy must be one of S, A, W"),
        ("NBSMT(policy='min')", "not separable"),
        ("NBSMT(threads=[2])", "threads must be"),
        ("NBSMT(threads=2j)", "threads"),
        ("NBSMT(bits=4)", "unexpected keyword argument 'bits'"),
        ("NBSMT(2, threads=2)", "multiple values"),
        ("NBSMT(threads=2, threads=4)", "once"),
        ("NBSMT(**{'threads': 2})", "once"),
        ("NBSMT(*[2])", "plain numbers or quoted strings"),
        ("NBSMT(threads=open('x'))", "plain numbers or quoted strings"),
        ("NBSMT(threads=2).__class__", "a preset"),
        ("__import__('os').system('true')", "a preset"),
        ("nbsmt-8t", "nbsmt-2t, nbsmt-4t"),
        ("NBSMT(threads=4", "in double quotes"),
        ("", "a preset"),
        ("\0", "a preset"),
        ("(" * 400, "a preset"),
        ("NBSMT(threads=" + "1" * 600 + ")", "longer than 500"),
        ("lambda: 0", "a preset"),
    ],
)
def test_refused_without_running_anything(text, told):
    with pytest.raises(RecoupError, match=told):
        parse_config(text)


def test_other_types_are_refused():
    with pytest.raises(RecoupError, match="a preset"):
        as_config(4)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_a_config_or_our_error(text):
    with contextlib.suppress(RecoupError):
        assert isinstance(parse_config(text), NBSMT)


@settings(deadline=None)
@given(CONFIGS, CONFIGS)
def test_titles_tell_configs_apart(one, other):
    assert (title(one) == title(other)) == (one == other)
