"""Global models: the paper's four, and any torchvision classifier."""

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
