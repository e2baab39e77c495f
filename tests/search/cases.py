"""A small network, its batches and a space of it, shared by the tests of searches."""

import torch

import recoup as rc
from recoup.search import Space
from tests.networks import images, small_net

OPTIONS = [rc.NBSMT(1), rc.NBSMT(2), rc.NBSMT(4, "A", "zero")]


def labelled(count=2, size=24, seed=0):
    """Batches with the float network's own classes as labels."""
    model = small_net()
    with torch.no_grad():
        return model, [(x, model(x).argmax(1)) for x in images(count * size, seed).split(size)]


def space(layers="re:block2.*"):
    return Space({layers: OPTIONS, "classifier": [None, rc.LBA.biased(4, 4)]})
