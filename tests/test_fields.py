"""A config of this file's own: checked, copied, coded, and never half made."""

import json
import pickle
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
import torch
import yaml

from recoup.errors import RecoupError
from recoup.fields import Config, Value, boolean, choice, integer


@dataclass(frozen=True, slots=True)
class Step(Value):
    size: int = 1


@dataclass(frozen=True, slots=True)
class Ladder(Config):
    steps: int = 8
    step: Step = Step()
    lean: str = "left"

    @classmethod
    def inner(cls) -> tuple[type[Value], ...]:
        return (Step,)

    def _check(self) -> None:
        self._set("steps", integer("Ladder", "steps", self.steps, (1, 99), ", a ladder's"))
        choice("Ladder", "lean", self.lean, ("left", "right"))

    def __repr__(self) -> str:
        return self._changed()


@dataclass(frozen=True, slots=True)
class House(Config):
    way: Step | Ladder | None = None
    closed: bool = False

    @classmethod
    def inner(cls) -> tuple[type[Value], ...]:
        return Step, Ladder

    def _check(self) -> None:
        boolean("House", "closed", self.closed)


CONFIGS: list[Config] = [
    Ladder(),
    Ladder(3, Step(2), "right"),
    House(),
    House(Step(4)),
    House(Ladder(step=Step(7)), closed=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_config_survives_yaml_pickle_and_its_own_code(config):
    assert type(config).from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert type(config).from_code(config.code) == config
    assert type(config).from_code(config.code) is type(config).from_code(config.code)
    copy = pickle.loads(pickle.dumps(config))
    assert (copy, copy.code, hash(copy), repr(copy)) == (config, config.code, hash(config), repr(config))
    assert config.replace() == config
    assert json.loads(config.code) == config.to_dict()


def test_the_code_is_the_fields_and_nothing_else():
    assert Ladder(3).code == '{"steps": 3, "step": {"size": 1}, "lean": "left"}'
    assert House(Step(4)).code == '{"way": {"Step": {"size": 4}}, "closed": false}'
    assert Ladder(3).replace(steps=4).code == Ladder(4).code
    assert "code" not in repr(House())


def test_a_repr_of_what_differs():
    assert repr(Ladder()) == "Ladder()"
    assert repr(Ladder(3, lean="right")) == "Ladder(steps=3, lean='right')"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Ladder(0), r"^Ladder\(steps=0\): steps must be an integer from 1 to 99, a ladder's$"),
        (lambda: Ladder(True), "steps must be an integer"),
        (lambda: Ladder("3"), "steps must be an integer"),  # type: ignore[arg-type]
        (lambda: Ladder(3).replace(lean="up"), r"^Ladder\(lean='up'\): lean must be one of 'left', 'right'$"),
        (lambda: House(closed=1), r"^House\(closed=1\): closed must be True or False$"),  # type: ignore[arg-type]
        (lambda: Ladder.from_dict({"rungs": 1}), "^Ladder: unknown field 'rungs'; the fields are steps, step, lean$"),
        (lambda: Ladder.from_dict({"step": {"width": 1}}), "^Step: unknown field 'width'; the fields are size$"),
        (lambda: House.from_dict({"way": {"size": 1}}), "is no format; expected its fields under one of Step, Ladder$"),
        (lambda: House.from_code('{"way": {"Ladder": {"steps": 0}}}'), r"^Ladder\(steps=0\)"),
    ],
)
def test_refused(make, told):
    with pytest.raises(RecoupError, match=told):
        make()


def test_types_are_settled_and_fields_frozen():
    config = Ladder(torch.tensor(5))  # type: ignore[arg-type]
    assert type(config.steps) is int
    assert config == Ladder(5)
    for name in ("steps", "code"):
        with pytest.raises(FrozenInstanceError):
            setattr(config, name, 4)
    slotless: Any = Ladder()
    assert not hasattr(slotless, "__dict__")


def test_a_code_is_a_constant_to_compilers():
    class Climb(torch.nn.Module):
        config = Ladder(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.config.steps + len(self.config.code)

    y = torch.compile(Climb(), fullgraph=True, backend="eager")(torch.zeros(1))
    assert y.item() == 3 + len(Ladder(3).code)
