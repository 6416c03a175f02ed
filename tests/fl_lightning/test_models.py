import pytest
import torch
from torch import nn

from fl_lightning.models import VGG7, ImageClassifier, LeNet5, ResNet9, ResNet18, TorchvisionClassifier
from fl_lightning.observation import build_model, describe_model, on_meta


@pytest.mark.parametrize(
    ("model_class", "parameters"),
    [  # counted by hand from the layers that the paper lists
        (LeNet5, (75 * 32 + 32) + (800 * 64 + 64) + 4096 * 512 + 512 * 10),
        (
            VGG7,
            (27 * 128 + 128) + (1152 * 128 + 128) + (1152 * 256 + 256) + (2304 * 256 + 256)
            + (2304 * 512 + 512) + (4608 * 512 + 512) + 8192 * 1024 + 1024 * 10,
        ),
        (
            ResNet9,
            147 * 64 + 2 * 576 * 64 + (576 + 64 + 1152) * 128 + (1152 + 128 + 2304) * 256
            + (2304 + 256 + 4608) * 512 + 32768 * 10,
        ),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_paper(model_class: type[ImageClassifier], parameters: int) -> None:
    model = model_class(10, (3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_resnet18_has_two_blocks_a_stage() -> None:
    nine, eighteen = (sum(p.numel() for p in m(10, (3, 32, 32)).parameters()) for m in (ResNet9, ResNet18))
    assert eighteen - nine == sum(2 * 9 * c * c for c in (64, 128, 256, 512))


def test_head_of_embedding_is_the_model() -> None:
    model = LeNet5(7, (1, 20, 20), mean=(0.5,), std=(0.2,))
    images = torch.rand(3, 1, 20, 20)
    torch.testing.assert_close(model.head(model.features((images - 0.5) / 0.2)), model(images))


def test_torchvision_by_name() -> None:
    model = TorchvisionClassifier(7, (3, 64, 64), name="resnet18")
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    assert model.head[-1].weight.shape == (7, 512)


@pytest.mark.parametrize(
    ("name", "widths"),
    [("alexnet", [9216, 4096, 4096]), ("vgg11", [25088, 4096, 4096]), ("mobilenet_v3_small", [1024])],
)
def test_the_linear_layers_at_the_end_are_the_head(name: str, widths: list[int]) -> None:
    model = on_meta(lambda: TorchvisionClassifier(7, (3, 64, 64), name=name))
    assert [layer.in_features for layer in model.head if isinstance(layer, nn.Linear)] == widths
    assert not any(isinstance(layer, nn.Linear) for layer in list(model.features.classifier)[-3:])


def test_description_rebuilds_the_same_function() -> None:
    model = ResNet9(5, (3, 16, 16), std=(0.3,))
    again = build_model(describe_model(model), model.state_dict())
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again(images), model(images))


@pytest.mark.parametrize(
    ("name", "image_shape", "sentence"),
    [
        ("resnet19", (3, 64, 64), "no classifier named 'resnet19'.*resnet18"),
        ("no such model", (3, 64, 64), "^torchvision has no classifier .{1,200}$"),
        ("squeezenet1_0", (3, 64, 64), "not in a linear layer"),
        ("resnet18", (1, 64, 64), "do not fit torchvision's 'resnet18'.*Give 3 channels"),
    ],
)
def test_unfit_torchvision_models_are_refused(name: str, image_shape: tuple[int, int, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TorchvisionClassifier(7, image_shape, name=name)


def test_too_small_images_and_zero_std_are_refused() -> None:
    with pytest.raises(ValueError, match=r"do not fit this model.*image_size"):
        LeNet5(7, (3, 2, 2))
    with pytest.raises(ValueError, match="must be positive"):
        LeNet5(7, (3, 16, 16), std=(0.0,))
