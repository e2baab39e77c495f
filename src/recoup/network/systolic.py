"""An output-stationary systolic array, and the cycles that a matrix product takes on it, in closed form."""

from dataclasses import dataclass
from typing import Any

from recoup.errors import RecoupError
from recoup.fields import boolean
from recoup.network.checks import instance


@dataclass(frozen=True, slots=True)
class Array:
    """An output-stationary systolic array.

    Every processing element keeps one output: activations enter at the left, skewed by one cycle per row, weights at
    the top, skewed by one per column, and both move on by one element per cycle. When a column is complete, its
    results are copied to a chain of registers beside the elements and leave through the last row, one per cycle.

    Attributes:
        rows: processing elements along the output positions.
        cols: processing elements along the output channels.
        overlap: whether a tile enters while the one before it still computes and drains. The skew and the last drain
            are then paid once per matrix product, but no tile is faster than the ``rows`` cycles its drain takes.
        latency: clock edges of operand and result registers, paid once per matrix product: 0 in a model of cycles;
            generated hardware says its own.

    Raises:
        RecoupError: rows or cols below 1, latency below 0, overlap no bool.
    """

    rows: int = 16
    cols: int = 16
    overlap: bool = True
    latency: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "cols"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RecoupError(f"Array({name}={value!r}): {name} must be an integer of 1 or more")
        if isinstance(self.latency, bool) or not isinstance(self.latency, int) or self.latency < 0:
            raise RecoupError(f"Array(latency={self.latency!r}): latency must be an integer of 0 or more")
        boolean("Array", "overlap", self.overlap)


def layer_cycles(
    M: int,
    C: int,
    N: int,
    threads: int = 1,
    array: Array | None = None,
    *,
    taps: int = 1,
    groups: int = 1,
    extra: int = 0,
) -> int:
    """Cycles of one layer.

        tiles     = ceil(M / rows) ceil(N / cols)
        reduction = ceil(C / T) taps + extra                 cycles in which a tile takes in operands
        overlap:    (tiles - 1) max(reduction, rows) + reduction + (rows + cols - 2) + rows + latency
        otherwise:   tiles (reduction + (rows + cols - 2) + rows) + latency

    The parentheses are the skew and the drain. A tile at the edge takes as long as a full one.

    Args:
        M: output positions of all images.
        C: input channels per group.
        N: output channels per group.
        threads: T.
        array: the array; None is 16 x 16.
        taps: kernel height times width.
        groups: of a grouped convolution; its groups run one after the other.
        extra: cycles a tile in which an element does something else, such as adding up chunk sums.

    Raises:
        RecoupError: a negative size, or threads or groups below 1.

    >>> layer_cycles(1024, 64, 64, threads=1, taps=9), layer_cycles(1024, 64, 64, threads=2, taps=9)
    (147502, 73774)
    """
    array = array_of(array, "layer_cycles")
    whole = all(isinstance(n, int) for n in (M, C, N, taps, threads, groups, extra))
    if not whole or min(M, C, N, taps, extra) < 0 or threads < 1 or groups < 1:
        raise RecoupError(
            f"layer_cycles: sizes must be 0 or more, threads and groups 1 or more; got M={M}, C={C}, N={N}, "
            f"taps={taps}, threads={threads}, groups={groups}"
        )
    tiles = -(-M // array.rows) * -(-N // array.cols)
    reduction = -(-C // threads) * taps
    if not tiles or not reduction:
        return 0
    reduction += extra
    fill_and_drain = (array.rows + array.cols - 2) + array.rows
    if array.overlap:
        return groups * ((tiles - 1) * max(reduction, array.rows) + reduction + fill_and_drain + array.latency)
    return groups * (tiles * (reduction + fill_and_drain) + array.latency)


def array_of(array: Any, owner: str) -> Array:
    """The array that an argument means: None is the default one; what is none is refused."""
    return Array() if array is None else instance(array, Array, owner, "array", "Array(rows=16, cols=16)")
