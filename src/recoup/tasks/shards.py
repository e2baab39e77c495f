"""The part of a plan that one of several processes makes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from recoup.errors import RecoupError


class IncompleteError(RecoupError):
    """Measurements of other shards are missing."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a plan that one of several processes makes: measurements i, i + n, i + 2n, ...

    Args:
        index: 0 to ``count`` - 1.
        count: how many there are.

    Raises:
        RecoupError: no such part.

    >>> Shard.parse("1/4")
    Shard(index=1, count=4)
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.index, self.count))
        if not whole or not 0 <= self.index < self.count:
            legal = (
                f"here 0/{self.count} to {self.count - 1}/{self.count}" if whole and self.count > 0 else "such as 0/4"
            )
            raise RecoupError(f"shard {self.index}/{self.count}: must be i/n with 0 <= i < n, {legal}")

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """``i/n``, or ``auto``: from the environment of a SLURM array job or an indexed Kubernetes job.

        Raises:
            RecoupError: neither, or no such environment.
        """
        if text == "auto":
            return cls._from_environment(os.environ)
        index, slash, count = text.partition("/")
        if not slash or not index.isdecimal() or not count.isdecimal():
            raise RecoupError(f"--shard {text!r}: must be i/n with 0 <= i < n, such as 0/4, or auto")
        return cls(int(index), int(count))

    @classmethod
    def _from_environment(cls, environment: Mapping[str, str]) -> "Shard":
        if "SLURM_ARRAY_TASK_ID" in environment:
            return cls._from_slurm(environment)
        kubernetes = ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")
        if all(name in environment for name in kubernetes):
            return cls(*(_number(environment, name) for name in kubernetes))
        raise RecoupError(
            "--shard auto: neither SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT nor JOB_COMPLETION_INDEX and "
            "JOB_COMPLETIONS (which a Kubernetes job must be given by hand) are set; give i/n"
        )

    @classmethod
    def _from_slurm(cls, environment: Mapping[str, str]) -> "Shard":
        """Of an array whose indices are evenly spaced; of others SLURM does not say which index is which part."""
        own, count = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT"))
        first, step = (_number(environment, f"SLURM_ARRAY_TASK_{n}", d) for n, d in (("MIN", "0"), ("STEP", "1")))
        last = _number(environment, "SLURM_ARRAY_TASK_MAX", str(first + (count - 1) * step))
        if step < 1 or not count or last != first + (count - 1) * step or own not in range(first, last + 1, step):
            raise RecoupError(
                f"--shard auto: the SLURM array of {count} tasks from {first} to {last} is not spaced by {step}: "
                "submit it as --array=0-N, or give i/n"
            )
        return cls((own - first) // step, count)


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not text.isdecimal():
        raise RecoupError(f"--shard auto: {name} is {text!r}, no number; give i/n")
    return int(text)
