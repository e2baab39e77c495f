import pytest

from recoup.errors import RecoupError, RecoupWarning
from recoup.formats import Float, Int
from recoup.grammar import parse_config
from recoup.lba import LBA

PRESETS = [LBA(), LBA.m7e4(chunk=64), LBA.m10e5(), LBA.fp32(), LBA.sequential14(), LBA.int16(), LBA.int12("wrap")]


@pytest.mark.parametrize("config", [*PRESETS, LBA(backward=LBA.biased(5, 4), operands=Int(8))], ids=repr)
def test_round_trips(config):
    assert eval(repr(config), {"LBA": LBA, "Float": Float, "Int": Int}) == config  # noqa: S307
    assert LBA.from_dict(config.to_dict()) == config
    assert config.replace() == config


def test_the_papers_unit():
    config = LBA.m7e4()
    assert (config.product.smallest_normal, config.product.largest_value) == (2.0**-12, 15.9375)
    assert (config.accumulator.smallest_normal, config.accumulator.largest_value) == (2.0**-10, 63.75)
    assert config.accumulator.bits == 12
    assert LBA.biased(7, 4, 10, chunk=64).product.min_exponent == -13  # b_acc + log2(64) / 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"chunk": 0}, r"chunk must be an integer from 1 to 2147483647, or None for no chunks"),
        ({"chunk": -4}, "chunk must be"),
        ({"chunk": 2.0}, "chunk must be"),
        ({"chunk": True}, "chunk must be"),
        ({"product": Int(8)}, "product must be a Float or None"),
        ({"accumulator": None}, "accumulator must be a Float or an Int"),
        ({"accumulator": Float.parse("float64")}, "at most 23 bits and exponents from -256 to 256"),
        ({"product": Float.ieee(11, 4)}, "exponents from -256 to 256"),
        ({"accumulator": Float.ieee(5, 4, overflow="inf")}, "and saturate"),
        ({"accumulator": Int(33)}, "2 to 32 bits"),
        ({"accumulator": Int(8, signed=False)}, "must be signed"),
        ({"underflow": 1}, "underflow must be True or False"),
        ({"gradient": "straight"}, "gradient must be one of 'identity'"),
        ({"scale": 0.5}, "scale belongs to an Int accumulator"),
        ({"accumulator": Int(8), "scale": 0.3}, "scale must be a power of two"),
        ({"backward": 3}, "backward must be an LBA"),
        ({"backward": LBA(), "gradient": "recursive_of"}, "gradient must be 'identity'"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of"),
        ({"operands": "fp8"}, "operands must be a Float, an Int, a pair of them"),
    ],
)
def test_refused(arguments, told):
    with pytest.raises(RecoupError, match=told):
        LBA(**arguments)


def test_a_bias_is_an_integer():
    with pytest.raises(RecoupError, match=r"LBA.biased\(bias='x'\): bias must be an integer from -256 to 256"):
        LBA.biased(7, 4, bias="x")  # type: ignore[arg-type]


def test_stochastic_anywhere():
    random = Float.lba(4, 7, bias=10, rounding="stochastic")
    assert not LBA(backward=LBA()).stochastic
    assert all(c.stochastic for c in (LBA(random), LBA(None, random), LBA(promotion=random), LBA(backward=LBA(random))))


def test_unknown_fields():
    with pytest.raises(RecoupError, match="unknown field 'bits'"):
        LBA.from_dict({"bits": 12})
    with pytest.raises(RecoupError, match="no format"):
        LBA.from_dict({"product": {"mantissa": 3}})


def test_the_former_name_of_the_14_bits():
    with pytest.warns(RecoupWarning, match=r"LBA.sequential14 now; Hopper's own adder is preset 'hopper-fp8'"):
        assert LBA.hopper(chunk=5) == LBA.sequential14(chunk=5)
    with pytest.warns(RecoupWarning, match="'lba-hopper' is called 'lba-sequential14' now"):
        assert parse_config("lba-hopper") == LBA.sequential14()
    with pytest.warns(RecoupWarning, match="Hopper's own adder"):
        assert parse_config("LBA.hopper()") == LBA.sequential14()
