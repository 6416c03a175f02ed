from collections.abc import Callable

import pytest

from attack_modules.simulation.feature_map import feature_map_shape
from fl_lightning.models import ImageClassifier, LeNet5, ResNet9, TorchvisionClassifier


def resnet18(num_classes: int, image_shape: tuple[int, int, int]) -> ImageClassifier:
    return TorchvisionClassifier(num_classes, image_shape, name="resnet18")


@pytest.mark.parametrize(
    ("model", "expected"),
    [(LeNet5, (64, 8, 16)), (ResNet9, (512, 8, 8)), (resnet18, (512, 1, 1))],
)
def test_the_map_that_is_flattened(model: Callable[..., ImageClassifier], expected: tuple[int, int, int]) -> None:
    assert feature_map_shape(model(5, (3, 32, 64)), (3, 32, 64)) == expected


def test_a_model_in_train_mode_is_probed_with_one_image_and_remembers_nothing() -> None:
    model = resnet18(5, (3, 16, 16))  # one value a channel at its end, of which BatchNorm takes no mean in train mode
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert feature_map_shape(model, (3, 16, 16)) == (512, 1, 1)
    assert model.features.training
    assert all(buffer.equal(before[name]) for name, buffer in model.named_buffers())
