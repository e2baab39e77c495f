"""Searches for the cheapest hardware of every layer within an accuracy budget.

space = Space({"re:layer.*": [NBSMT(1), NBSMT(2), NBSMT(4)], "linear": [None, LBA.m7e4()]})
scores = score(model, batches, space, out="results")
found = verify(front(scores, "cycles"), model, test)
emulate_(model, found.within(0.5).policy)
"""

from recoup.search.fronts import Front, Point, front
from recoup.search.joining import join
from recoup.search.narrow import CANDIDATES, Found, narrowest
from recoup.search.refining import refine
from recoup.search.scoring import Scores, score
from recoup.search.spaces import Space
from recoup.search.verifying import verify
from recoup.tasks.shards import Shard

__all__ = [
    "CANDIDATES",
    "Found",
    "Front",
    "Point",
    "Scores",
    "Shard",
    "Space",
    "front",
    "join",
    "narrowest",
    "refine",
    "score",
    "verify",
]
