"""Global models: the four models of the paper (arXiv 2410.04661), torchvision's classifiers, and a user's module."""

from fl_lightning.models.classifier import Arguments, ClassifierFactory, ImageClassifier, ImageShape
from fl_lightning.models.efficientnet_lite0 import EfficientNetLite0
from fl_lightning.models.freezing import Trainable
from fl_lightning.models.lenet5 import LeNet5
from fl_lightning.models.resnet import ResNet9, ResNet18
from fl_lightning.models.torchvision import TorchvisionClassifier
from fl_lightning.models.vgg7 import VGG7
from fl_lightning.models.wrapped import WrappedClassifier

__all__ = [
    "VGG7",
    "Arguments",
    "ClassifierFactory",
    "EfficientNetLite0",
    "ImageClassifier",
    "ImageShape",
    "LeNet5",
    "ResNet9",
    "ResNet18",
    "TorchvisionClassifier",
    "Trainable",
    "WrappedClassifier",
]
