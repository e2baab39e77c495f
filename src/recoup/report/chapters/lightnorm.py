"""LightNorm's part of a report: what batch norms move to and from memory."""

from collections.abc import Mapping

from recoup.report.chapters import Chapter, Limit
from recoup.study.results import Results

TERMS = {
    "batch norm traffic": (
        "Bits that batch norms read from and write to memory in a training step, counted from shapes, a pass over a "
        "feature map at its stored width: a model, our own count. Conventional: 7 reads and 2 writes in float32; "
        "range: 5 reads and 2 writes."
    ),
    "range": "The standard deviation is estimated from ranges in the pass that sums: a read less forward and backward.",
    "format": "Activations and gradients are stored in a narrow floating point format.",
    "blocks": (
        "Neighbouring channels share an exponent. Where a lone largest element keeps its own, a block stores two "
        "exponents and an index."
    ),
}


def terms(results: Results) -> Mapping[str, str]:
    """The columns, where there are any."""
    return TERMS if results.rows("traffic") else {}


CHAPTER = Chapter(
    terms=terms,
    modelled=(
        "Range batch norm, with the network's running statistics: every rounding of inputs, parameters and results, "
        "and shared exponents. Its traffic is counted from shapes.",
    ),
    limits={
        "functions": Limit("Activation functions, residual additions, and normalisation without a LightNorm unit"),
        "memory": Limit("Memory beyond that count"),
    },
)
