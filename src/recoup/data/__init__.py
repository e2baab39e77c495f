"""Real images for measuring accuracy: scikit-learn's digits, CIFAR-10, MNIST, image folders, Hugging Face datasets.

:func:`load` reads one from a string; the :class:`Dataset` it returns gives batches that can be passed over again and
again with the same images. Nothing is downloaded except by ``hf:NAME``.
"""

from recoup.data.augmentation import CenterCrop, CropFlip, ResizedCrop
from recoup.data.dataset import Batches, Dataset
from recoup.data.loading import load, root
from recoup.data.pictures import Pictures

__all__ = ["Batches", "CenterCrop", "CropFlip", "Dataset", "Pictures", "ResizedCrop", "load", "root"]
