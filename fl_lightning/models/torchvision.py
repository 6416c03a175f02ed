"""torchvision's classifiers as global models."""

import difflib
from collections.abc import Sequence

import torch
import torchvision
from torch import nn
from torch.func import functional_call
from torchvision.ops import StochasticDepth

from fl_lightning.errors import SettingError, in_short
from fl_lightning.models.classifier import ImageClassifier, ImageShape

AUXILIARY = ("googlenet", "inception_v3")
"""Models that return the logits of auxiliary classifiers beside their own, unless told otherwise."""


class TorchvisionClassifier(ImageClassifier):
    """A classifier from `torchvision.models` without pretrained weights; the linear layers at its end are the head.

    These are three for AlexNet and VGG, with a ReLU between each two, and one for the others.

    BatchNorm is in train mode during local training; `federation.share_buffers` sets whether its running statistics
    are aggregated with the model. Stochastic depth (EfficientNet, ConvNeXt, Swin, MaxViT) is off and auxiliary
    classifiers (GoogLeNet, Inception) are left out, because the attack can simulate neither.

    Args:
        num_classes: number of logits.
        image_shape: (C, H, W) of an image; torchvision's classifiers require 3 channels.
        name: as in `torchvision.models.list_models()`, e.g. `resnet18` or `mobilenet_v3_small`.
        dropout: rate of every dropout layer. The default is 0, unlike torchvision's, because units that are dropped at
            random can be read of a single local step, but not simulated over several.
        mean, std: normalisation of the input, see `ImageClassifier`; torchvision usually uses
            [0.485, 0.456, 0.406] and [0.229, 0.224, 0.225].

    Raises:
        SettingError: `name` is not a torchvision classifier, its last layer is not linear, or `image_shape` does not
            fit it.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: ImageShape,
        name: str,
        dropout: float = 0.0,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__(mean, std)
        self.save_hyperparameters()
        classifiers = torchvision.models.list_models(module=torchvision.models)
        if name not in classifiers:
            near = difflib.get_close_matches(name.lower(), classifiers) or ["resnet18", "vgg11", "mobilenet_v3_small"]
            raise SettingError(
                f"torchvision has no classifier named '{name}'. Set `federation.model.name` to one, for example "
                f"{', '.join(near)}; `torchvision.models.list_models()` lists them all."
            )
        extra = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
        self.features = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)
        layer_name, layer = [pair for pair in self.features.named_modules() if not list(pair[1].children())][-1]
        if not isinstance(layer, nn.Linear):
            raise SettingError(
                f"torchvision's '{name}' ends in {type(layer).__name__}, not in a linear layer, so it cannot be "
                "split into feature extractor and head. Choose another model, e.g. resnet18."
            )
        head = _linear_stack(self.features, layer_name)
        for name in head:
            self.features.set_submodule(name, nn.Identity())
        self.head = nn.Sequential(*(nn.ReLU() if isinstance(m, nn.ReLU) else m for m in head.values()))  # not in place
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            if isinstance(module, StochasticDepth):
                module.p = 0.0
        self._refuse_unfit(image_shape)

    @torch.no_grad()
    def _refuse_unfit(self, image_shape: ImageShape) -> None:
        statistics = {name: buffer.clone() for name, buffer in self.named_buffers()}  # BatchNorm changes these
        try:
            logits = functional_call(self, statistics, (torch.zeros(2, *image_shape),))
        except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
            raise SettingError(
                f"Images of shape {tuple(image_shape)} do not fit torchvision's '{self.hparams['name']}' in train mode "
                f"({in_short(error)}). Give 3 channels (`data.channels`) and larger images (`data.image_size`), or "
                "choose another model."
            ) from error
        assert logits.shape == (2, self.hparams["num_classes"])


def _linear_stack(model: nn.Module, last: str) -> dict[str, nn.Module]:
    """The modules from the first of the linear layers that lead to the last one, with a ReLU between each two.

    Args:
        model: whose modules they are, of one container.
        last: name of its last linear layer.
    """
    container, _, _ = last.rpartition(".")
    stack, before = {last: model.get_submodule(last)}, []
    siblings = [(f"{container}.{name}", module) for name, module in model.get_submodule(container).named_children()]
    if not isinstance(model.get_submodule(container), nn.Sequential) or siblings[-1][0] != last:
        return stack
    for name, module in reversed(siblings[:-1]):
        before.insert(0, (name, module))
        if isinstance(module, nn.Linear):
            if [type(m) for _, m in before[1:] if not isinstance(m, nn.Dropout)] != [nn.ReLU]:
                break
            stack, before = {**dict(before), **stack}, []
    return stack
