"""Datasets and their partition among the clients."""

from fl_lightning.data.catalogue import Catalogue
from fl_lightning.data.cifar10 import CIFAR10, CIFAR10Test
from fl_lightning.data.federated import FederatedData
from fl_lightning.data.image_folder import ImageFolder
from fl_lightning.data.images import ImageSet, UnreadableImage, read_image
from fl_lightning.data.mnist import MNIST, FashionMNIST
from fl_lightning.data.partition import IID, ByClass, Dirichlet, InOrder, Partition
from fl_lightning.data.photographs import Photographs

__all__ = [
    "CIFAR10",
    "IID",
    "MNIST",
    "ByClass",
    "CIFAR10Test",
    "Catalogue",
    "Dirichlet",
    "FashionMNIST",
    "FederatedData",
    "ImageFolder",
    "ImageSet",
    "InOrder",
    "Partition",
    "Photographs",
    "UnreadableImage",
    "read_image",
]
