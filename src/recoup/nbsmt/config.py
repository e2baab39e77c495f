"""The NB-SMT configuration: what the shared multiplier does when threads collide."""

from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, get_args

from recoup.errors import RecoupError
from recoup.fields import Config, Value, is_number
from recoup.formats import Int

Policy = Literal["S", "A", "W", "Aw", "aW", "S+A", "S+W", "S+Aw", "S+aW"]
Rounding = Literal["nearest", "half_up", "zero"]
Pairing = Literal["halves", "adjacent"]
Port = Literal[5, 4]

POLICIES: tuple[str, ...] = get_args(Policy)
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
PAIRINGS: tuple[str, ...] = get_args(Pairing)
PORTS: tuple[int, ...] = get_args(Port)
THREADS = (1, 2, 4)
LEAST, MOST = 8, 32
"""Bits of an accumulator."""

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
            and weights do not feel it.
        accumulator: the register that products are added to, a signed `Int` of 8 to 32 bits; None: one of 32 bits that
            no layer may leave. Slots are added one by one, channel by channel of the thread and, within, tap by tap:
            first a slot's products, exactly, then their sum to the register, which ``saturate``s or ``wrap``s. A layer
            whose sums could leave 32 bits is refused under ``Int(32)`` too, which therefore never differs from None.

    ``port`` and ``accumulator`` are written in the repr and in `to_dict` where they are not the default.

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
    accumulator: Int | None = None
    # Made once, so that compilers trace them.
    _single: "NBSMT | None" = field(init=False, repr=False, compare=False)
    _eight_bit: "NBSMT | None" = field(init=False, repr=False, compare=False)

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
        self._check_accumulator()
        self._set("_single", None if self.threads == 1 else _on_one_thread(self))
        self._set("_eight_bit", None if self.accumulator is None else _unlimited(self.single))

    def _check_accumulator(self) -> None:
        register = self.accumulator
        legal = isinstance(register, Int) and register.signed and LEAST <= register.bits <= MOST
        if register is not None and not legal:
            raise RecoupError(
                f"NBSMT(accumulator={register!r}): accumulator must be None or a signed Int of {LEAST} to {MOST} bits, "
                "such as Int(18)"
            )

    def __setstate__(self, state: Any) -> None:
        """Of pickles of before, whose values lie by place: the first is the code, which names the others."""
        if not isinstance(state, list) or not state or not isinstance(state[0], str):
            raise RecoupError(f"NBSMT: a pickle holds {state!r}, which is no state of a config: make the config anew")
        made = NBSMT.from_code(state[0])
        for each in fields(self):
            self._set(each.name, getattr(made, each.name))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values; what came after the first four only where it is not the default."""
        unsaid = {"port": 5, "accumulator": None}  # digests, recipes and logs of before do not know these fields
        values = super(NBSMT, self).to_dict()
        return {name: value for name, value in values.items() if name not in unsaid or value != unsaid[name]}

    def __repr__(self) -> str:
        return f"NBSMT({', '.join(f'{name}={getattr(self, name)!r}' for name in self.to_dict())})"

    @classmethod
    def inner(cls) -> tuple[type[Value], ...]:
        """The accumulator."""
        return (Int,)

    @property
    def single(self) -> "NBSMT":
        """The same unit on one thread: the plain array, with 8-bit products."""
        return self._single or self

    @property
    def eight_bit(self) -> "NBSMT":
        """The plain array with exact sums: what sharing, and the accumulator, are measured against."""
        return self._eight_bit or self.single

    @property
    def zero_test(self) -> bool:
        """Whether zero operands free the multiplier (the policy contains ``S``)."""
        return "S" in self.policy


@lru_cache(maxsize=256)
def _on_one_thread(config: NBSMT) -> NBSMT:
    """One object for all configs that differ in nothing else: half of the time that a config takes."""
    return config.replace(threads=1)


@lru_cache(maxsize=256)
def _unlimited(config: NBSMT) -> NBSMT:
    return config.replace(accumulator=None)
