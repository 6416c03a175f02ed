"""Models of every kind: what an attack relies on is tried, and what does not fit is named."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from attack_modules.threat_model.observed import RoundsSummary
from attack_modules.threat_model.requirements import (
    LinearHead,
    NoRandomLayers,
    ReadableDropout,
    Requirement,
    SeparableModel,
    TwiceDifferentiable,
)
from attack_modules.threat_model.trial import Trial, no_second_derivative
from fl_lightning.errors import SettingError
from fl_lightning.models import VGG7, ImageClassifier, ImageShape, LeNet5, ResNet9, TorchvisionClassifier
from fl_lightning.observation import describe_model

SHAPE = (3, 16, 16)


class Plain(ImageClassifier):
    """Linear features, two linear layers; subclasses change one thing."""

    between: Callable[[], nn.Module] = nn.ReLU

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__((0.5,), (0.25,))
        self.save_hyperparameters()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 12), nn.Dropout(0.0))
        self.head = nn.Sequential(nn.Linear(12, 12), self.between(), nn.Linear(12, num_classes))


class WithSigmoid(Plain):
    between = nn.Sigmoid


class WithoutReLU(Plain):
    between = nn.Identity


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class WithOwnLinear(Plain):
    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        self.head[0] = ScaledLinear(12, 12)


class DropoutFirst(Plain):
    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        self.head.insert(0, nn.Dropout(0.0))


class SingleLayerHead(Plain):
    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        self.head = nn.Linear(12, num_classes)


class Temperature(Plain):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) / 2


class OtherEmbedding(Plain):
    def embed(self, images: Tensor) -> Tensor:
        return super().embed(images).tanh()


class Beside(Plain):
    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        self.scale = nn.Parameter(torch.ones(()))


class HiddenDropout(Plain):
    def embed(self, images: Tensor) -> Tensor:
        return F.dropout(super().embed(images), 0.1, self.training)


class HeadDropout(Plain):
    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        self.features.append(nn.Dropout(0.5))
        self.head.insert(2, nn.Dropout(0.2))


class Residual(Plain):
    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        self.features.append(StochasticDepth(0.5, "row"))
        self.features.append(nn.RReLU())


class Counting(Plain):
    """Random without torch: outputs depend on how often it was called."""

    calls = 0

    def embed(self, images: Tensor) -> Tensor:
        type(self).calls += self.training
        return super().embed(images) * (1 + self.training * self.calls)


class WithHardsigmoid(Plain):
    between = nn.Hardsigmoid


class Computed(Plain):
    """Looks at the values of a tensor while it is built, as RegNet and timm's models do: not on the meta device."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(num_classes, image_shape)
        self.rates = torch.linspace(0, 1, 3).tolist()


class Failing(Plain):
    def embed(self, images: Tensor) -> Tensor:
        raise KeyError("no such layer")


def violation(requirement: Requirement, model_class: type[ImageClassifier]) -> str | None:
    summary = RoundsSummary.of_model(describe_model(model_class(7, SHAPE)), [])
    return requirement.violation(summary)


@pytest.mark.parametrize(
    ("model_class", "requirement", "sentence"),
    [
        (WithSigmoid, LinearHead(), r"has a Sigmoid in its head \(head\.1\).*--model GradientInversion"),
        (WithoutReLU, LinearHead(), "something else than its linear layers with a ReLU between"),
        (WithOwnLinear, LinearHead(), "something else than its linear layers"),
        (DropoutFirst, LinearHead(), "does not begin and end in a linear layer"),
        (SingleLayerHead, LinearHead(), r"head of type Linear where an nn\.Sequential"),
        (Temperature, SeparableModel(), "other logits in `forward`"),
        (OtherEmbedding, SeparableModel(), "other features in `embed`"),
        (Beside, SeparableModel(), r"outside `features` and `head` \(scale\)"),
        (HiddenDropout, NoRandomLayers(), r"random while it trains: HiddenDropout\.forward"),
        (HiddenDropout, ReadableDropout(), r"random numbers elsewhere while it trains: HiddenDropout\.forward"),
        (Residual, NoRandomLayers(), r"features\.3 \(StochasticDepth\), features\.4 \(RReLU\)"),
        (WithHardsigmoid, TwiceDifferentiable(), r"has none \(derivative for aten::hardsigmoid_backward"),
        (Counting, NoRandomLayers(), "two passes of the same images in train mode differ"),
    ],
)
def test_what_does_not_fit_is_named(model_class: type[Plain], requirement: Requirement, sentence: str) -> None:
    found = violation(requirement, model_class)
    assert found is not None
    assert len(found) < 320  # with the attack's name at most 400
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(found)


@pytest.mark.parametrize("model_class", [Plain, LeNet5, VGG7, ResNet9])
def test_what_fits_is_not_refused_and_costs_no_random_number(model_class: type[ImageClassifier]) -> None:
    model = model_class(7, SHAPE)
    state = torch.get_rng_state()
    layers = sum(isinstance(layer, nn.Linear) for layer in model.head)
    assert Trial.of(model) == Trial(None, None, None, (0.0,) * layers)
    assert no_second_derivative(model) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_measured() -> None:
    assert Trial.of(HeadDropout(7, SHAPE)).dropout == pytest.approx((0.5, 0.2), abs=1e-3)


def test_a_model_whose_constructor_looks_at_values_is_tried() -> None:
    assert violation(LinearHead(), Computed) is None


def test_a_model_that_fails_is_a_sentence() -> None:
    with pytest.raises(SettingError, match=r"Failing fails on 2 random images of shape \(3, 16, 16\) \(KeyError"):
        violation(SeparableModel(), Failing)


def test_torchvisions_random_layers_are_off() -> None:
    model = TorchvisionClassifier(7, (3, 32, 32), name="efficientnet_b0")
    depths = [layer.p for layer in model.modules() if isinstance(layer, StochasticDepth)]
    assert depths
    assert not any(depths)
    assert Trial.of(model).random is None
