import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recoup.errors import RecoupError
from recoup.formats import Float, Int
from recoup.lba import LBA
from recoup.lightnorm import LightNorm
from recoup.nbsmt.config import NBSMT, PAIRINGS, POLICIES, ROUNDINGS
from recoup.study.configs import as_config, parse_config, presets, title

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
    shared = {name: config for name, config in presets().items() if isinstance(config, NBSMT)}
    assert shared == {"nbsmt-2t": NBSMT(threads=2), "nbsmt-4t": NBSMT(threads=4)}
    assert parse_config("lba-m7e4") == LBA.m7e4()
    assert parse_config("lightnorm-fp10") == LightNorm.fp10()
    assert parse_config("lightnorm-range") == LightNorm.range()
    assert parse_config("lightnorm") == LightNorm()
    assert all(parse_config(repr(config)) == config for config in presets().values())
    assert parse_config(" nbsmt-2t ") == NBSMT(threads=2)


FORMATS = st.builds(
    Float.lba,
    st.integers(1, 8),
    st.integers(0, 23),
    st.integers(0, 128),
    rounding=st.sampled_from(("zero", "nearest", "stochastic")),
)
UNITS = st.builds(
    LBA,
    product=st.none() | FORMATS,
    accumulator=FORMATS | st.builds(Int, st.integers(2, 32), overflow=st.sampled_from(("wrap", "saturate"))),
    chunk=st.none() | st.integers(1, 4096),
    underflow=st.booleans(),
    operands=st.none() | FORMATS | st.builds(Int, st.integers(2, 8)),
)


@settings(deadline=None)
@given(UNITS)
def test_every_unit_is_read_back(config):
    assert parse_config(repr(config)) == config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("LBA(product=Float.values())", "plain numbers or quoted strings, or formats"),
        ("LBA(LBA(LBA(LBA(LBA(LBA())))))", "formats"),
        ("LBA(chunk=0)", "chunk must be"),
        ("Float.lba(4, 7, bias=10)", "a preset"),
        ("LBA.from_dict({})", "a preset"),
        ("LBA.biased(7)", "missing"),
    ],
)
def test_units_refused(text, told):
    with pytest.raises(RecoupError, match=told):
        parse_config(text)


def test_titles_of_units():
    assert title(LBA()) == "M7E4 (12 bits), chunk 16"
    assert title(LBA.int12("wrap", operands=Int(4))) == "int12, wraps, no chunks, W/A int4"
    assert "FP8" in title(LBA(operands=Float.lba(3, 4, bias=3, rounding="nearest")))


VALUES = st.builds(
    Float.ieee,
    st.integers(2, 8),
    st.integers(0, 23),
    subnormals=st.booleans(),
    rounding=st.sampled_from(("zero", "nearest")),
) | st.sampled_from(("fp10_154", "fp10_163", "bfloat16", "float16", "e4m3fn")).map(Float.parse)
NORMS = st.builds(
    LightNorm,
    forward=st.none() | VALUES,
    backward=st.none() | VALUES,
    statistics=st.none() | VALUES,
    block=st.integers(1, 64),  # without blocks nothing is shared, and titles leave that field out
    chunks=st.integers(1, 64),
    scale=st.sampled_from(("gaussian", "paper", "hoffer")),
    shared=st.sampled_from(("outlier", "max")),
    nonfinite=st.sampled_from(("propagate", "error")),
)


@settings(deadline=None)
@given(NORMS)
def test_every_norm_is_read_back(config):
    assert parse_config(repr(config)) == config
    assert as_config(config) is config


@settings(deadline=None)
@given(NORMS, NORMS)
def test_titles_tell_norms_apart(one, other):
    assert (title(one) == title(other)) == (one == other)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lightnorm", "LightNorm, FP10 1-5-4, blocks of 4"),
        ("lightnorm-fp10", "LightNorm, FP10 1-5-4"),
        ("lightnorm-range", "LightNorm, float"),
        ("LightNorm.range(chunks=1, scale='paper')", "LightNorm, float, 1 chunk, scale paper"),
        ("LightNorm(forward=Float.parse('bfloat16'))", None),
        ("LightNorm(block=8, shared='max')", "LightNorm, FP10 1-5-4, blocks of 8, largest exponent shared"),
    ],
)
def test_titles_of_norms(text, said):
    assert title(parse_config(text)).startswith(
        said or "LightNorm, FP16 1-8-7 to nearest with subnormals, gradients FP10"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("LightNorm(block=0)", "block must be"),
        ("LightNorm(scale='wrong')", "scale must be"),
        ("LightNorm(forward='fp10_154')", "must be a Float or None"),
        ("LightNorm(forward=Float.parse('fp11'))", "unknown format"),
        ("LightNorm.from_dict({})", "a preset"),
    ],
)
def test_norms_refused(text, told):
    with pytest.raises(RecoupError, match=told):
        parse_config(text)


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
        ("NBSMT(threads=" + "1" * 1100 + ")", "longer than 1000"),
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
        assert isinstance(parse_config(text), NBSMT | LBA | LightNorm)


@settings(deadline=None)
@given(CONFIGS, CONFIGS)
def test_titles_tell_configs_apart(one, other):
    assert (title(one) == title(other)) == (one == other)
