"""Spaces: which layers are in them, what they may take, and what is refused."""

import pytest
from torch import nn

import recoup as rc
from recoup.errors import RecoupError
from recoup.search import Space
from recoup.search.scoring import plan
from recoup.search.spaces import policy_of, titles, uniform
from tests.networks import small_net

NARROW = rc.LBA.biased(4, 4)


def test_first_match_wins_and_layers_that_no_option_takes_are_none_of_it():
    space = Space(
        {
            "block1.conv1": [None, NARROW],
            "re:block1.*": ["nbsmt-2t", rc.NBSMT(1)],
            "re:.*bn.": ["float", rc.LightNorm()],
        }
    )
    groups = {group.name: group.options for group in space.groups(small_net())}
    # As in a layer map: block1's norms match its key first, whose options do not take them.
    assert list(groups) == ["block1.conv1", "block1.conv2", "block1.shortcut", "block2.bn1", "block2.bn2"]
    assert groups["block1.conv1"] == (None, NARROW)
    assert groups["block1.conv2"] == groups["block1.shortcut"] == (rc.NBSMT(2), rc.NBSMT(1))
    assert groups["block2.bn2"] == (None, rc.LightNorm())


def test_layers_that_decide_together():
    space = Space({"re:block.*": [rc.NBSMT(1), rc.NBSMT(2)]}, same=[["re:block1.*", "block2.conv1"], "re:block2.*cut"])
    groups = space.groups(small_net())
    assert [(group.name, len(group.layers)) for group in groups] == [
        *(("block1.conv1 and 3 more", 4), ("block2.conv2", 1), ("block2.shortcut", 1)),
    ]
    policy = policy_of(groups, (1, 0, 1), "mixed")
    assert dict(policy) == dict.fromkeys(groups[0].layers, rc.NBSMT(2)) | {
        "block2.conv2": rc.NBSMT(1),
        "block2.shortcut": rc.NBSMT(2),
    }


def test_uniform_policies_are_those_of_most_layers():
    space = Space({"re:block.*": [rc.NBSMT(1), rc.NBSMT(2)], "classifier": [None, NARROW]})
    groups = space.groups(small_net())
    assert uniform(groups) == {rc.NBSMT(1): (0,) * 7, rc.NBSMT(2): (1,) * 6 + (0,)}
    assert titles(uniform(groups)) == {rc.NBSMT(1): "1 thread, S+A", rc.NBSMT(2): "2 threads, S+A"}


def test_options_of_one_title_are_two_policies(monkeypatch):
    """Titles are for people; two hardwares may have the same."""
    monkeypatch.setattr("recoup.search.spaces.title", lambda option: "float" if option is None else "narrow")
    wide = rc.LBA.biased(7, 4)
    groups = Space({"re:block1.*": [NARROW, wide, None]}).groups(small_net())
    assert list(uniform(groups).values()) == [(0,) * 3, (1,) * 3, (2,) * 3]
    assert titles(uniform(groups)) == {NARROW: f"narrow ({NARROW!r})", wide: f"narrow ({wide!r})", None: "float"}
    assert groups[0].titles() == list(titles(uniform(groups)).values())
    made = plan(small_net(), Space({"re:block1.*": [NARROW, wide, None]}), probes=2)
    assert [options for _, options, _ in made.probes] == [(0,) * 3, (1,) * 3]


class Scaled(nn.Conv2d):
    def forward(self, input):  # noqa: A002
        return 2 * super().forward(input)


def test_a_subclass_is_called_one():
    model = small_net()
    model.stem.__class__ = Scaled
    with pytest.raises(RecoupError, match="it is a Scaled, a subclass of Conv2d that may compute something else"):
        Space({"stem": [None, NARROW]}).groups(model)


@pytest.mark.parametrize(
    ("layers", "options", "told"),
    [
        ({}, {}, "not empty"),
        ({"stem": []}, {}, "one option or more"),
        ({"stem": ["nbsmt-2t", rc.NBSMT(2)]}, {}, "each once"),
        ({"stem": "nbsmt-2t"}, {}, "a list of options"),
        ({"stem": ["nbsmt-9t"]}, {}, "must be a preset"),
        ({3: [None]}, {}, "a key is a layer's name"),
        ({"stem": [None]}, {"at_most": {"units": 0}}, "'units': 1 or more"),
        ({"stem": [None]}, {"at_most": {"cells": 1}}, "'units': 1 or more"),
        ({"conv9": [None, NARROW]}, {}, "'conv9' matches no layer"),
        ({"re:block.*": [NARROW], "block1.conv1": [None, NARROW]}, {}, "'block1.conv1' is left no layer"),
        ({"stem": [NARROW, rc.LightNorm()]}, {}, "LightNorm.* cannot take layer 'stem': a Conv2d is for NBSMT"),
        ({"re:block.*": [NARROW, rc.LightNorm()]}, {}, "cannot take layer 'block1.conv1': a Conv2d is for"),
        ({"re:block1.*": [NARROW], "re:block2.*": [None, NARROW]}, {"same": [["re:.*conv1"]]}, "have other options"),
        ({"re:block.*": [NARROW]}, {"same": [["re:block1.*"], ["re:.*conv1"]]}, "two lists of same"),
        ({"re:block.*": [NARROW]}, {"same": [["stem9"]]}, "'stem9' matches no layer"),
    ],
)
def test_bad_spaces_are_refused(layers, options, told):
    with pytest.raises(RecoupError, match=told):
        Space(layers, **options).groups(small_net())


def test_an_emulated_network_is_refused():
    model = rc.emulate_(nn.Sequential(nn.Linear(4, 4)), NARROW)
    with pytest.raises(RecoupError, match="emulated already"):
        Space({"0": [NARROW]}).groups(model)
