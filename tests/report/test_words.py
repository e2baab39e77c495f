from recoup.report.chapters import Chapter, Limit
from recoup.report.words import LIMITS, not_modelled


def test_limits_in_general():
    assert not_modelled([]) == [
        "Layers outside the emulation: their accuracy is that of float.",
        "Activation functions, residual additions and normalisation: float, as torch computes them.",
        "Memory.",
        "Area, energy and clock frequency.",
    ]


def test_one_chapter_names_the_thing_and_another_what_becomes_of_it():
    subject, clause = Limit("Memory beyond that count"), Limit(clause="operands arrive in time")
    for first, second in ((subject, clause), (clause, subject)):
        said = not_modelled([Chapter(limits={"memory": first}), Chapter(limits={"memory": second})])
        assert said[2] == "Memory beyond that count: operands arrive in time."


def test_a_limit_of_a_chapters_own_comes_last():
    assert not_modelled([Chapter(limits={"wear": Limit("Wear", "cells are new")})])[len(LIMITS) :] == [
        "Wear: cells are new."
    ]
