"""Global models: the four models of the paper (arXiv 2410.04661), and torchvision's classifiers."""

from fl_lightning.models.classifier import FIRST_LAYER, ClassifierFactory, ImageClassifier, ImageShape
from fl_lightning.models.lenet5 import LeNet5
from fl_lightning.models.resnet import ResNet9, ResNet18
from fl_lightning.models.torchvision import TorchvisionClassifier
from fl_lightning.models.vgg7 import VGG7

__all__ = [
    "FIRST_LAYER",
    "VGG7",
    "ClassifierFactory",
    "ImageClassifier",
    "ImageShape",
    "LeNet5",
    "ResNet9",
    "ResNet18",
    "TorchvisionClassifier",
]
