"""What a network is judged by, and how reports call it: accuracy of a classifier, nats a token of a language model."""

import math
from dataclasses import dataclass

SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
LARGEST = 700.0  # nats whose exponential is a float


@dataclass(frozen=True, slots=True)
class Quality:
    """A measure of a whole network.

    Attributes:
        name: of the measure and of its column in results.
        label: in tables.
        second: the number beside it: the five best classes, or the perplexity.
        title, heading: of tables, and of the page's section.
        axis: of plots, which draw what is better to the right or above.
        unit: of differences.
        suffix: behind a value in a sentence.
        sample: what data are counted in.
        rises: whether more is better.
        digits: behind the point.
        worth: a loss of at most so much needs no repair; of a smaller one the share won back says nothing.
        paired: whether a sample has a number of its own, so that intervals are over samples' spread; else it is right
            or wrong.
    """

    name: str
    label: str
    second: str
    title: str
    heading: str
    axis: str
    unit: str
    suffix: str
    sample: str
    rises: bool
    digits: int
    worth: float
    paired: bool

    @property
    def samples(self) -> str:
        """Several."""
        return f"{self.sample}s"

    def number(self, value: float) -> str:
        """In tables."""
        return f"{value:.{self.digits}f}"

    def signed(self, value: float) -> str:
        """A difference, with its sign."""
        return f"{value:+.{self.digits}f}"

    def text(self, value: float) -> str:
        """In sentences.

        >>> TOP1.text(91.6).split(), NATS.text(1.61809).split()
        (['91.60', '%'], ['1.6181', 'nats'])
        """
        return f"{value:.{self.digits}f}{SPACE}{self.suffix}"

    def better(self, value: float) -> float:
        """The larger the better."""
        return value if self.rises else -value

    def lost(self, before: float, now: float) -> float:
        """What is worse now; below 0 where it is better."""
        return self.better(before) - self.better(now)

    def worded(self, text: str) -> str:
        """A text about images in the words of these samples.

        >>> NATS.worded("Cycles an image, on all images")
        'Cycles a window, on all windows'
        """
        if self.sample == "image":
            return text
        articles = {"an image": f"a {self.sample}", "An image": f"A {self.sample}", "image": self.sample}
        for said, other in {**articles, "their accuracy is that of float": "they compute what float does"}.items():
            text = text.replace(said, other)
        return text


TOP1 = Quality(
    *("top1", "top-1", "top-5", "Top-1 accuracy, %", "Accuracy", "top-1 accuracy, %", "points", "%", "image"),
    rises=True,
    digits=2,
    worth=0.1,
    paired=False,
)
NATS = Quality(
    *("nats", "nats", "perplexity", "Nats a token", "Nats a token", "nats a token (less is better)", "nats", "nats"),
    sample="window",
    rises=False,
    digits=4,
    worth=0.001,
    paired=True,
)


def perplexity(nats: float) -> float:
    """exp(nats), of more than 700 that of 700."""
    return math.exp(min(nats, LARGEST))


def perplexity_text(value: float) -> str:
    """In tables: four figures.

    >>> perplexity_text(5.0437), perplexity_text(50257.3)
    ('5.044', '50,257')
    """
    return f"{value:,.0f}" if 1000 <= value < 1e9 else f"{value:#.4g}".rstrip(".")
