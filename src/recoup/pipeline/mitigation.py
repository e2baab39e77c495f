"""What a pipeline does against the delay of its gradients: one frozen value."""

from dataclasses import dataclass
from typing import Literal, get_args

from recoup.errors import RecoupError
from recoup.fields import Value, boolean, choice, integer

Prediction = Literal["none", "velocity", "weight", "spectrain"]


@dataclass(frozen=True, slots=True)
class Mitigation(Value):
    """How a stage's update and its forward weights make up for a delay of D updates.

    With momentum m, velocity v' = m v + g and learning rate eta:

        w' = w - eta (a v' + b g),   a = m^(alpha D),  b = (1 - m^(alpha D)) / (1 - m)      Spike Compensation (SC)
        forward with  w - eta T v   (``velocity``, LWPv)   or   w + T (w - w_before)   (``weight``, LWPw),  T = D times
        ``horizon``                                                                    Linear Weight Prediction (LWP)

    and otherwise w' = w - eta v'. The backward pass uses the newest weights; with ``stash`` those of the forward;
    with ``spectrain`` both passes predict: the backward s updates ahead and the forward D + s, at stage s.

    Attributes:
        compensation: alpha of SC; 0: none.
        prediction: ``none``, ``velocity``, ``weight`` or ``spectrain``.
        horizon: T / D of the prediction.
        stash: keep the forward's weights for the backward pass (PipeDream).
        shrink: beta of gradient shrinking, g beta^D.
        annealing: updates K over which PipeMare's rate eta / D^(1 - min(k / K, 1)) rises to eta; 0: none.

    Raises:
        RecoupError: a field outside its range: alpha and horizon from 0 to 100, beta above 0 and at most 1; stash with
            a prediction.

    Source: Kosson et al., "Pipelined Backpropagation at Scale", MLSys 2021; Harlap et al. (stashing), Chen et al.
    (SpecTrain), Zhuang et al. (shrinking) and Yang et al. (PipeMare). ``horizon`` and the combination of all with all
    are our definitions.

    >>> Mitigation.parse("lwpv+sc")
    Mitigation(compensation=1.0, prediction='velocity')
    """

    compensation: float = 0.0
    prediction: Prediction = "none"
    horizon: float = 1.0
    stash: bool = False
    shrink: float = 1.0
    annealing: int = 0

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
        if self.stash and self.prediction != "none":
            raise RecoupError(
                f"Mitigation(stash=True, prediction={self.prediction!r}): a prediction needs the newest weights in the "
                "backward pass; choose one of them"
            )

    @classmethod
    def parse(cls, name: str) -> "Mitigation":
        """A mitigation by its name.

        Raises:
            RecoupError: an unknown name; the message lists the known ones.
        """
        if not isinstance(name, str) or name not in NAMES:
            raise RecoupError(f"Mitigation.parse({name!r}): the names are {', '.join(NAMES)}")
        return NAMES[name]

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
