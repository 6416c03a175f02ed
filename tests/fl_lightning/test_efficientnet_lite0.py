"""The frozen backbone with pretrained weights."""

import copy

import pytest
import torch

from fl_lightning.errors import SettingError
from fl_lightning.models import EfficientNetLite0
from fl_lightning.observation import build_on_meta, describe_model


def test_only_the_head_is_a_parameter_and_features_are_the_same_in_train_mode() -> None:
    model = EfficientNetLite0(10, (3, 32, 32))
    assert list(model.state_dict()) == ["head.0.weight", "head.0.bias"]
    images = torch.rand(3, 3, 32, 32)
    features = model.eval().embed(images)
    assert features.shape == (3, 1280)
    assert features.std() > 0.01
    computed = model.train().embed(images.clone().requires_grad_())
    torch.testing.assert_close(computed, features, rtol=1e-4, atol=1e-4)
    remembered = copy.deepcopy(model).embed(images.flip(0))
    torch.testing.assert_close(remembered, features.flip(0), rtol=0, atol=0)


def test_a_description_builds_it_without_its_weights() -> None:
    model = build_on_meta(describe_model(EfficientNetLite0(4, (3, 32, 32))))
    assert model(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 4)


def test_a_second_layer_is_asked_for_by_its_units() -> None:
    model = build_on_meta(describe_model(EfficientNetLite0(4, (3, 32, 32), hidden_units=7)))
    assert [tuple(p.shape) for p in model.head.parameters()] == [(7, 1280), (7,), (4, 7), (4,)]
    with pytest.raises(SettingError, match="hidden_units >= 1"):
        EfficientNetLite0(4, (3, 32, 32), hidden_units=0)


def test_grey_or_tiny_images_are_refused() -> None:
    for shape in ((1, 32, 32), (3, 16, 16)):
        with pytest.raises(SettingError, match="RGB images of at least 32"):
            EfficientNetLite0(10, shape)
