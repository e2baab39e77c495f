"""Energy and area in searches: a unit's area once, whatever runs on it; equal to brute force; what has none is said."""

import itertools

import numpy as np
import pytest

pytest.importorskip("amaranth")

import recoup as rc
from recoup.errors import RecoupError
from recoup.knapsack import Quantity
from recoup.network.sites import survey
from recoup.network.systolic import Array
from recoup.search import Space, front, score
from recoup.search.prices import affordable, limits_of
from tests.networks import small_net
from tests.search.cases import labelled
from tests.test_dies import FLAT

LAYERS = ("block1.conv1", "block2.conv1", "classifier")
OPTIONS = [rc.NBSMT(1), rc.NBSMT(2), rc.NBSMT(4), rc.LBA.int12(operands=rc.Int(4))]
SHAPE, ARRAY = (3, 8, 8), Array(4, 4)
COSTS = ("cycles", "energy", "area")


@pytest.fixture(scope="module")
def liberty(tmp_path_factory):
    path = tmp_path_factory.mktemp("liberty") / "tiny.lib"
    path.write_text(FLAT)
    return path


@pytest.fixture(scope="module")
def space():
    model = small_net()
    return Space(dict.fromkeys(LAYERS, OPTIONS)).groups(model), survey(model, SHAPE, "test")


@pytest.fixture(scope="module")
def everything(liberty):
    """The costs of all 64 policies by `rc.cost`."""
    model, found = small_net(), {}
    for options in itertools.product(range(4), repeat=3):
        told = rc.cost(
            model, dict(zip(LAYERS, (OPTIONS[o] for o in options), strict=True)), SHAPE, ARRAY, liberty=liberty
        )
        found[options] = {"energy": told.energy, "area": told.area}
    return found


def test_costs_are_those_of_rc_cost(space, everything, liberty):
    priced = affordable(*space, COSTS, None, ARRAY, None, liberty).priced
    for options, told in everything.items():
        found = priced.of(options)
        assert (found["energy"], found["area"]) == (pytest.approx(told["energy"]), pytest.approx(told["area"]))
    assert priced.first["area"] == pytest.approx(everything[0, 0, 0]["area"])
    one, four, mixed = (everything[options]["area"] for options in ((0, 0, 0), (2, 2, 2), (0, 1, 2)))
    assert one < four == mixed  # four threads run two and one
    assert everything[2, 2, 3]["area"] > four


@pytest.mark.parametrize("limit", [1.0, 1.3, 1.6, 2.0, 2.5])
def test_the_best_policy_within_an_area_is_that_of_brute_force(space, everything, liberty, limit):
    generator = np.random.default_rng(round(10 * limit))
    first = everything[0, 0, 0]
    for _ in range(4):
        damage = Quantity(generator.random((3, 4)).tolist())
        program = affordable(*space, COSTS, {"area": limit, "energy": 1.1}, ARRAY, None, liberty)
        within = [
            options
            for options, told in everything.items()
            if told["area"] <= limit * first["area"] * (1 + 1e-9) and told["energy"] <= 1.1 * first["energy"]
        ]
        chosen = program.choose(damage)
        assert chosen.value == pytest.approx(min(damage.of(options) for options in within))
        assert chosen.options in within
        assert {options for options in everything if program.allows(options)} == set(within)
        least = program.choose(program.priced.quantities["area"])
        assert least.value == pytest.approx(min(everything[options]["area"] for options in within))


def test_fronts_and_their_limits(liberty):
    model, batches = labelled()
    space = Space({LAYERS[0]: OPTIONS[:3], LAYERS[1]: OPTIONS[:2]})
    scores = score(model, batches, space, probes=0)
    found = front(scores, COSTS, limits={"area": 1.35}, points=3, array=ARRAY, liberty=liberty)
    assert found.costs == COSTS
    for point in found.front:
        told = rc.cost(model, point.policy, SHAPE, ARRAY, liberty=liberty)
        assert point.costs["area"] == pytest.approx(told.area)
        assert point.costs["energy"] == pytest.approx(told.energy)
        assert told.area <= found.limits["area"]
    assert any(point.costs["area"] > found.first["area"] for point in found.front)
    outside, energy, area = found.notes
    assert energy.startswith("not in energy: stem, ")
    assert energy.endswith("classifier: in float, for which no hardware is generated")
    assert area.startswith("not in area: stem, ")
    assert outside.startswith("Outside the space no hardware runs stem, ")
    assert outside.endswith(
        "classifier and 4 norms: counted as float, a multiply-accumulate a cycle and 32 bits a number."
    )
    gates = front(scores, "area", limits={"area": "1000 kNAND2"}, points=2, array=ARRAY)
    assert gates.limits == {"area": 1e6}
    area = found.first["area"]
    for limits, told in (
        ({"area": 0.9}, "no policy keeps every limit; alone, the cheapest has area .* where .* is asked"),
        ({"area": f"{area * 0.5 / 1e6:.9f} mm2"}, "alone, the cheapest has area"),
        ({"area": 2, "energy": "1 pJ"}, "the cheapest has area .*; energy .* where 1 is asked"),
        ({"area": "3 NAND2"}, "must be a number with a unit of um2, mm2"),
    ):
        with pytest.raises(RecoupError, match=told):
            front(scores, COSTS, limits=limits, array=ARRAY, liberty=liberty)


def test_limits_with_units():
    assert limits_of({"area": "1.2mm2", "energy": "3 uJ"}, {"area": 1.0, "energy": 1.0}) == {
        "area": 1.2e6,
        "energy": 3e6,
    }
    with pytest.raises(RecoupError, match="a unit of NAND2, kNAND2"):
        limits_of({"area": "1.2mm2"}, {"area": 1.0}, "NAND2")


@pytest.mark.parametrize(
    ("options", "cost", "told"),
    [
        ([None, rc.NBSMT(1)], "area", "layer 'classifier' has the option float, for which no hardware is generated"),
        ([None, rc.NBSMT(1)], "energy", "layer 'classifier' has the option float"),
        ([rc.LBA(), rc.NBSMT(1)], "area", "layer 'classifier' has none on M7E4 .*operands=None are float32"),
    ],
)
def test_an_option_without_a_price_is_refused_beside_others(options, cost, told, liberty):
    model = small_net()
    groups, sizes = Space({"classifier": options}).groups(model), survey(model, SHAPE, "test")
    with pytest.raises(RecoupError, match=told):
        affordable(groups, sizes, cost, None, ARRAY, None, liberty)


def test_an_option_without_a_price_that_is_the_only_one_is_named(liberty):
    model = small_net()
    groups = Space({"classifier": [rc.LBA()], "stem": [rc.NBSMT(1), rc.NBSMT(2)]}).groups(model)
    priced = affordable(groups, survey(model, SHAPE, "test"), "area", None, ARRAY, None, liberty).priced
    assert "classifier: silicon: LBA(): operands=None are float32" in priced.notes[0]
    both = affordable(groups, survey(model, SHAPE, "test"), "area", {"area": 2}, ARRAY, 2, liberty)
    assert both.choose(both.priced.quantities["area"]) is not None
