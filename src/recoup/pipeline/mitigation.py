"""What a pipeline does against the delay of its gradients: one frozen value."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from recoup.errors import RecoupError
from recoup.fields import Value, boolean, choice, integer

Prediction = Literal["none", "velocity", "weight", "spectrain"]
Reach = Literal["delay", "coasting"]


@dataclass(frozen=True, slots=True)
class Mitigation(Value):
    """How a stage's update and its forward weights make up for a delay of D updates.

    With momentum m, velocity v' = m v + g and learning rate eta:

        w' = w - eta (a v' + b g),   a = m^(alpha D),  b = (1 - m^(alpha D)) / (1 - m)      Spike Compensation (SC)
        forward with  w - eta T v   (``velocity``, LWPv)   or   w + T (w - w_before)   (``weight``, LWPw),  T = D times
        ``horizon``                                                                    Linear Weight Prediction (LWP)

    and otherwise w' = w - eta v'. Other rules (`optimizers.AdamW`) have their own form of SC, and their direction for
    v. The backward pass uses the newest weights; with ``stash`` those of the forward; with ``past`` w + eta D v, about
    what the forward saw; with ``spectrain`` both passes predict: the backward s updates ahead and the forward D + s,
    at stage s.

    Attributes:
        compensation: alpha of SC; 0: none.
        prediction: ``none``, ``velocity``, ``weight`` or ``spectrain``.
        horizon: T over what ``reach`` says.
        stash: keep the weights that the forward saw, predicted or not, for the backward pass (PipeDream).
        shrink: beta of gradient shrinking, g beta^D.
        annealing: updates K over which PipeMare's rate eta / D^(1 - min(k / K, 1)) rises to eta; 0: none.
        reach: T = D (``delay``), or ``coasting``: T = m (1 - m^D) / (1 - m), where the weights would be in D updates if
            all coming gradients were zero; tends to D for m = 1 and to m / (1 - m) for large D.
        past: whether the backward pass goes back along the velocity.

    Raises:
        RecoupError: a field outside its range: alpha and horizon from 0 to 100, beta above 0 and at most 1; two of
            stash, past and spectrain, which each say what the backward pass sees; coasting without a prediction along
            the velocity.

    Source: Kosson et al., "Pipelined Backpropagation at Scale", MLSys 2021; Harlap et al. (stashing), Chen et al.
    (SpecTrain), Zhuang et al. (shrinking), Yang et al. (PipeMare) and LayerPipe2 (``past``). ``horizon``, ``coasting``
    and the combination of all with all are our definitions.

    >>> Mitigation.parse("lwpv+sc")
    Mitigation(compensation=1.0, prediction='velocity')
    """

    compensation: float = 0.0
    prediction: Prediction = "none"
    horizon: float = 1.0
    stash: bool = False
    shrink: float = 1.0
    annealing: int = 0
    reach: Reach = "delay"
    past: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (("compensation", 0.0, 100.0), ("horizon", 0.0, 100.0), ("shrink", 0.0, 1.0)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high or (name == "shrink" and value == 0):
                above = "above 0 and at most 1" if name == "shrink" else f"from {low:g} to {high:g}"
                raise RecoupError(f"Mitigation({name}={value!r}): {name} must be a number {above}")
            object.__setattr__(self, name, float(value))
        choice("Mitigation", "prediction", self.prediction, get_args(Prediction))
        boolean("Mitigation", "stash", self.stash)
        object.__setattr__(self, "annealing", integer("Mitigation", "annealing", self.annealing, (0, 1 << 62)))
        choice("Mitigation", "reach", self.reach, get_args(Reach))
        boolean("Mitigation", "past", self.past)
        returning = [n for n, on in (("stash", self.stash), ("past", self.past)) if on]
        returning += ["spectrain"] * (self.prediction == "spectrain")
        if len(returning) > 1:
            raise RecoupError(
                f"Mitigation: {' and '.join(returning)} both say which weights the backward pass uses; choose one"
            )
        if self.reach == "coasting" and not (self.past or self.prediction == "velocity"):
            raise RecoupError(
                f"Mitigation(reach='coasting', prediction={self.prediction!r}): only a prediction along the velocity "
                "coasts"
            )

    @classmethod
    def parse(cls, name: str) -> "Mitigation":
        """A mitigation by its name, or by names joined with ``+``.

        Raises:
            RecoupError: an unknown name, or names that do not go together; the message lists the known ones.

        >>> Mitigation.parse("coasting+stash")
        Mitigation(prediction='velocity', stash=True, reach='coasting')
        """
        if isinstance(name, str) and name in NAMES:
            return NAMES[name]
        parts = name.split("+") if isinstance(name, str) else []
        if not parts or any(part not in PARTS for part in parts) or len(set(parts)) < len(parts):
            known = ", ".join([*NAMES, *(part for part in PARTS if part not in NAMES)])
            raise RecoupError(f"Mitigation.parse({name!r}): the names are {known}, and several joined with +")
        if sum("prediction" in PARTS[part] for part in parts) > 1:
            raise RecoupError(f"Mitigation.parse({name!r}): a forward pass has one prediction; choose one")
        fields: dict[str, object] = {}
        for part in parts:
            fields |= PARTS[part]
        return cls(**fields)  # type: ignore[arg-type]

    @classmethod
    def of(cls, value: Any, owner: str) -> "Mitigation":
        """A mitigation from itself or its name.

        Raises:
            RecoupError: anything else.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise RecoupError(f"{owner}(mitigation={value!r}): must be a name such as 'lwpv+sc', or a Mitigation")
        return cls.parse(value)

    def __repr__(self) -> str:
        """What differs from the defaults; it can be pasted back."""
        return self._changed()


NAMES = {
    "none": Mitigation(),
    "stash": Mitigation(stash=True),
    "sc": Mitigation(compensation=1.0),
    "lwpv": Mitigation(prediction="velocity"),
    "lwpw": Mitigation(prediction="weight"),
    "lwpv+sc": Mitigation(compensation=1.0, prediction="velocity"),
    "lwpw+sc": Mitigation(compensation=1.0, prediction="weight"),
    "spectrain": Mitigation(prediction="spectrain"),
}
PARTS: dict[str, dict[str, object]] = {
    "stash": {"stash": True},
    "sc": {"compensation": 1.0},
    "lwpv": {"prediction": "velocity"},
    "lwpw": {"prediction": "weight"},
    "spectrain": {"prediction": "spectrain"},
    "coasting": {"prediction": "velocity", "reach": "coasting"},
    "past": {"past": True},
}
