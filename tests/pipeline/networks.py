"""Small networks in stages, and samples for them."""

import torch
from torch import nn

from recoup.pipeline import Simulator, delays
from recoup.pipeline.norms import StandardizedConv2d


def convolutional(dtype=torch.float32):
    """Convolutions (one standardized, one 1 x 1), norms, pooling and a linear layer; 6 stages, odd sizes."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.GroupNorm(3, 6), nn.ReLU()),
        nn.Sequential(StandardizedConv2d(6, 5, 3, stride=2), nn.Tanh()),
        nn.Sequential(nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(5, 7, 1), nn.GroupNorm(1, 7), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(7, 9), nn.LayerNorm(9), nn.ReLU()),
        nn.Sequential(nn.Linear(9, 3)),
    ).to(dtype)


def multilayer(stages=5, width=7, dtype=torch.float64, seed=0):
    """Linear layers with tanh, the last without."""
    torch.manual_seed(seed)
    hidden = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(stages - 1)]
    return nn.Sequential(*hidden, nn.Sequential(nn.Linear(width, 3))).to(dtype)


def by_child(net):
    """A stage a child."""
    return [[name] for name, _ in net.named_children()]


def images(count, dtype=torch.float32, shape=(1, 1, 7, 7)):
    """Noise with labels."""
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(shape, generator=generator, dtype=dtype), torch.randint(3, (shape[0],), generator=generator))
        for _ in range(count)
    ]


def vectors(count, width=7, dtype=torch.float64, batch=1):
    """Noise with labels."""
    return images(count, dtype, (batch, width))


def weights(net):
    """All parameters, copied, by name."""
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def make(net, *arguments, delays_=None, **options):
    """A simulator with a stage a child."""
    stages = by_child(net)
    return Simulator(net, stages, delays(len(stages)) if delays_ is None else delays_, *arguments, **options)


def rates(k):
    """A schedule."""
    return 0.04 / (1 + k / 20)


def same_state(one, other):
    """Equal in everything, but for generators."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return set(one) == set(other) and all(same_state(one[k], other[k]) for k in one if k != "random")
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_state, one, other))
    return one == other
