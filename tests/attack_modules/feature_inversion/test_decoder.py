import pytest
import torch
from torch import Tensor, nn

from attack_modules.feature_inversion.dead_leaves import dead_leaves
from attack_modules.feature_inversion.decoder import FeatureDecoder
from fl_lightning.models import ImageClassifier, LeNet5, ResNet9


class Blocks(ImageClassifier):
    """Its features are the pixels, a map of 4x4 blocks."""

    def __init__(self) -> None:
        super().__init__((0.5,), (0.25,))
        self.features = nn.Sequential(nn.PixelUnshuffle(4), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(3 * 16 * 16, 5, bias=False))


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    return -10 * (images - originals).square().mean((1, 2, 3)).log10()


def test_what_is_an_affine_function_of_the_image_is_undone() -> None:
    model, images = Blocks(), torch.rand(20, 3, 16, 24)
    decoded = FeatureDecoder(model, (3, 16, 24))(model.embed(images))
    assert psnr(decoded, images).min() > 40


@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_it_never_saw_are_recognisable_at_once(channels: int) -> None:
    torch.manual_seed(0)
    shape = (channels, 32, 32)
    model, images = LeNet5(5, shape), dead_leaves(8, shape, seed=1)
    decoded = FeatureDecoder(model, shape)(model.embed(images))
    assert decoded.shape == images.shape
    means = images.mean((2, 3), keepdim=True).expand_as(images)
    assert (psnr(decoded, images) - psnr(means, images)).mean() > 3


def test_many_channels_are_decoded_place_by_place() -> None:
    shape = (3, 64, 64)
    decoder = FeatureDecoder(model := ResNet9(5, shape), shape)
    assert decoder.neighbourhood == 1
    assert decoder(model.embed(torch.rand(1, *shape))).shape == (1, *shape)


def test_features_that_are_no_map_are_refused() -> None:
    model = Blocks()
    model.features = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert not FeatureDecoder.fits(model, (3, 16, 16))
    with pytest.raises(ValueError, match="no map"):
        FeatureDecoder(model, (3, 16, 16))
    assert not FeatureDecoder.fits(LeNet5(5, (3, 18, 18)), (3, 18, 18))  # 4x4 places for 18 pixels
