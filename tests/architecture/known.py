"""Faults against the rules of the house that are still to be mended: strike out what you mend, add nothing.

An entry that is no longer found fails the test, so that the tables only shrink.
"""

KNOWN: dict[str, frozenset[str]] = {}
