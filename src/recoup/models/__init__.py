"""Networks to try the hardware on, and loading of your own.

CIFAR: :func:`resnet20` ... :func:`resnet110`, :func:`vgg11` ... :func:`vgg16`, :func:`mobilenet_v1`. ImageNet:
:func:`resnet18`, :func:`resnet34`, :func:`resnet50`. Handwritten digits: :func:`digits_net`.
Text: :func:`chargpt`. :func:`load` builds any
network from a string, :func:`load_weights_` fills it from a file.
"""

from recoup.models.cifar import resnet20, resnet32, resnet44, resnet56, resnet110
from recoup.models.digits import digits_net
from recoup.models.imagenet import resnet18, resnet34, resnet50
from recoup.models.loading import load
from recoup.models.mobilenet import mobilenet_v1
from recoup.models.transformer import chargpt, load_chargpt
from recoup.models.vgg import vgg11, vgg13, vgg16
from recoup.models.weights import load_weights_

__all__ = [
    "chargpt",
    "digits_net",
    "load",
    "load_chargpt",
    "load_weights_",
    "mobilenet_v1",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet110",
    "vgg11",
    "vgg13",
    "vgg16",
]
