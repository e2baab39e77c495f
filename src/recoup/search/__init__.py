"""Searches for the cheapest hardware of every layer within an accuracy budget."""

from recoup.search.narrow import CANDIDATES, Found, narrowest

__all__ = ["CANDIDATES", "Found", "narrowest"]
