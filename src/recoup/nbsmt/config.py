"""The NB-SMT configuration: what the shared multiplier does when threads collide."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

from recoup.errors import RecoupError
from recoup.fields import Config, is_number

Policy = Literal["S", "A", "W", "Aw", "aW", "S+A", "S+W", "S+Aw", "S+aW"]
Rounding = Literal["nearest", "half_up", "zero"]
Pairing = Literal["halves", "adjacent"]
Port = Literal[5, 4]

POLICIES: tuple[str, ...] = get_args(Policy)
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
PAIRINGS: tuple[str, ...] = get_args(Pairing)
PORTS: tuple[int, ...] = get_args(Port)
THREADS = (1, 2, 4)

_NOT_SEPARABLE = (
    "; a policy that reduces whichever operand errs less depends on both operands at once (it is not separable), "
    "has no exact matrix form and is refused"
)


@dataclass(frozen=True, slots=True)
class NBSMT(Config):
    """Two or four threads that share one 8-bit multiply-accumulate unit (non-blocking simultaneous multithreading).

    The reduction dimension K is split among the threads; every cycle the unit takes one 8-bit activation, unsigned or
    signed, and one signed 8-bit weight per thread and adds all products to one accumulator. Where more than one product
    needs the multiplier (a *collision*) operands are reduced to 4 bits instead of waiting, so that

        Y = X W - sum over collisions of what was rounded away

    Attributes:
        threads: 1 (the plain array: exact 8-bit arithmetic), 2 or 4.
        policy: which slack is looked for before an operand is reduced. ``S``: zero operands; ``A``/``W``: the
            activations or the weights are reduced, unless they fit 4 bits; ``Aw``/``aW``: both are looked at, the
            capital letter names the operand that is reduced when neither fits. Without ``S`` every pair counts as
            a collision. "Reduce whichever operand errs less" depends on both operands together, so it has no
            exact matrix form; it is refused.
        rounding: how an operand loses its 4 low bits: ``nearest`` (ties to even), ``half_up``
            (floor(v/16 + 1/2)) or ``zero`` (truncation of the magnitude).
        pairing: ``halves``: thread t owns the t-th contiguous block of K (in a convolution: of the input channels,
            every tap); ``adjacent``: thread t owns every index congruent to t modulo ``threads``.
        port: bits of a multiplier's port that signed activations meet. 5: -16..15 fit, others become
            8 clip(round(v/8), -16, 15); 4: -8..7 fit, others become 16 clip(round(v/16), -8, 7). Unsigned activations
            and weights do not feel it. It is written in the repr and in `to_dict` where it is not 5.

    Raises:
        RecoupError: a field outside these values; the message names the field and what is legal.

    Source: Shomron and Weiser, "Non-Blocking Simultaneous Multithreading", MICRO 2020. The two-letter policies, the
    four-thread rule, the three roundings and all of signed activations are our definitions.

    >>> NBSMT(threads=4)
    NBSMT(threads=4, policy='S+A', rounding='nearest', pairing='halves')
    """

    threads: int = 2
    policy: Policy = "S+A"
    rounding: Rounding = "nearest"
    pairing: Pairing = "halves"
    port: Port = 5
    _single: "NBSMT | None" = field(init=False, repr=False, compare=False)  # made once, so that compilers trace it

    def _check(self) -> None:
        if not is_number(self.threads) or self.threads not in THREADS:
            raise RecoupError(f"NBSMT(threads={self.threads!r}): threads must be 1, 2 or 4")
        self._set("threads", int(self.threads))
        for name, legal in (("policy", POLICIES), ("rounding", ROUNDINGS), ("pairing", PAIRINGS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in legal:
                hint = _NOT_SEPARABLE if name == "policy" else ""
                raise RecoupError(f"NBSMT({name}={value!r}): {name} must be one of {', '.join(legal)}{hint}")
        if not is_number(self.port) or self.port not in PORTS:
            raise RecoupError(f"NBSMT(port={self.port!r}): port must be 5 or 4, bits that signed activations meet")
        self._set("port", int(self.port))
        self._set("_single", None if self.threads == 1 else _on_one_thread(self))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; what came after the first four only where it is not the default."""
        return {name: value for name, value in super(NBSMT, self).to_dict().items() if not self._unsaid(name, value)}

    def __repr__(self) -> str:
        return f"NBSMT({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    @staticmethod
    def _unsaid(name: str, value: Any) -> bool:
        """Digests, recipes and logs of before know nothing of such a field."""
        return (name, value) in (("port", 5),)

    @property
    def single(self) -> "NBSMT":
        """The same unit on one thread: the plain array, with exact 8-bit arithmetic."""
        return self._single or self

    @property
    def zero_test(self) -> bool:
        """Whether zero operands free the multiplier (the policy contains ``S``)."""
        return "S" in self.policy


@lru_cache(maxsize=256)
def _on_one_thread(config: NBSMT) -> NBSMT:
    """One object for all configs that differ in nothing else: half of the time that a config takes."""
    return config.replace(threads=1)
