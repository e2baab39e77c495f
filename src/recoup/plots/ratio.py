"""How many times less something takes, in words."""

FEWER = ("fewer", "as many", "more")
LESS = ("less", "as much", "more")


def times(ratio: float, words: tuple[str, str, str] = LESS) -> str:
    """A saving: ``before / after``, above 0, with the words for less, the same and more.

    Below 1.1 two decimals, of which one would say that nothing is saved.

    >>> times(1.84), times(1.03, FEWER), times(1.0), times(0.5)
    ('1.8x less', '1.03x fewer', 'as much', '2.0x more')
    """
    larger = max(ratio, 1 / ratio)
    text = f"{larger:.2f}" if larger < 1.095 else f"{larger:.1f}"
    less, same, more = words
    return same if text == "1.00" else f"{text}x {less if ratio > 1 else more}"
