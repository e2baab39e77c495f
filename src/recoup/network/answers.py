"""Which samples of a test a classifier answered rightly, a bit each, and how two such tests differ sample by sample."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from recoup.errors import RecoupError

Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True, slots=True)
class Flips:
    """Samples that are answered otherwise than before: ``lost`` were right and are wrong, ``won`` the reverse.

    They are the two cells of McNemar's table that a difference of accuracies rests on; the others are alike in both.
    """

    lost: int
    won: int
    count: int

    @property
    def changed(self) -> int:
        """All of them."""
        return self.lost + self.won

    @property
    def points(self) -> float:
        """What is lost: 100 (lost - won) / count, below 0 where more is won."""
        return 100 * (self.lost - self.won) / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `points`, `paired_interval` cut to [-100, 100]."""
        low, high = paired_interval(self.lost - self.won, self.changed, self.count)
        return max(low, -100.0), min(high, 100.0)


def paired_interval(images: float, changed: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a difference of two accuracies on the same samples, in points.

        (k +- 1.96 sqrt(m + 1 - k^2 / (n + 2))) / (n + 2)

    k = ``images``: lost less won; m = ``changed``: lost and won; n = ``count``. It is Wald's for paired proportions
    with half a sample added to each of the four outcomes (Agresti and Min, Statistics in Medicine 24, 2005), so it has
    a width where nothing changed. It may end beyond 100 points.
    """
    total = count + 2
    half = Z * (changed + 1 - images**2 / total) ** 0.5
    return 100 * (images - half) / total, 100 * (images + half) / total


@dataclass(frozen=True, slots=True)
class Answers:
    """Right or wrong, of each sample in order.

    Attributes:
        bits: four samples a hexadecimal digit, the first in the highest bit, 1 where the answer is right; the last two
            digits are filled with zeros. Text, so that results that hold it are plain values.
        count: samples.
        samples: a digest of inputs and labels in order; "" where it is not known.
    """

    bits: str
    count: int
    samples: str = ""

    @classmethod
    def of(cls, right_N: Tensor, samples: str = "") -> "Answers":
        """Of booleans."""
        return cls(np.packbits(right_N.cpu().numpy()).tobytes().hex(), len(right_N), samples)

    @property
    def _whole(self) -> int:
        return int.from_bytes(bytes.fromhex(self.bits))

    @property
    def right(self) -> int:
        """How many."""
        return self._whole.bit_count()

    def flips(self, before: "Answers") -> Flips:
        """What changed since ``before``, on the same samples.

        Raises:
            RecoupError: other samples, another order, or another number of them; samples that nobody looked at.

        >>> import torch
        >>> right = torch.tensor([True, True, False]), torch.tensor([True, False, True])
        >>> before, now = (Answers.of(one, "three digits") for one in right)
        >>> now.flips(before)
        Flips(lost=1, won=1, count=3)
        """
        if not self.samples or not before.samples:
            raise RecoupError("answers cannot be compared one by one where it is not known to which samples they are")
        if (self.count, self.samples) != (before.count, before.samples):
            raise RecoupError(
                f"answers to {self.count:,} samples and to {before.count:,} cannot be compared one by one: they are "
                "of other samples, or in another order"
            )
        now, then = self._whole, before._whole
        return Flips((then & ~now).bit_count(), (now & ~then).bit_count(), self.count)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the bits in base64, 4 characters for 24 samples."""
        right = base64.b64encode(bytes.fromhex(self.bits)).decode()
        return {"right": right, "count": self.count, "samples": self.samples}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Answers":
        """What `to_dict` gave.

        Raises:
            RecoupError: anything else, such as bits for another number of samples.
        """
        try:
            bits, count, samples = base64.b64decode(values["right"], validate=True), values["count"], values["samples"]
            whole = isinstance(count, int) and isinstance(samples, str) and count > 0
            if not whole or len(bits) != -(-count // 8) or int.from_bytes(bits) & ((1 << -count % 8) - 1):
                raise ValueError(f"{len(bits)} bytes for {count} samples")
        except (KeyError, TypeError, ValueError) as error:
            raise RecoupError(f"answers of a measurement cannot be read ({error})") from None
        return cls(bits.hex(), count, samples)
