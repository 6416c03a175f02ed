from collections.abc import Callable

import pytest
import torch

from attack_modules import FeatureInversion
from attack_modules.attack import Level
from attack_modules.feature_inversion.decoder import FeatureDecoder
from attack_modules.feature_inversion.scale import feature_scale
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.client import LocalTraining
from fl_lightning.data import Photographs
from fl_lightning.federation import Federation
from fl_lightning.models import LeNet5, ResNet9

Observe = Callable[..., ObservedRound]


@pytest.mark.parametrize("factor", [0.1, 0.4, 1.0, 3.0, 20.0])
def test_the_factor_on_the_features_of_photographs_is_found(factor: float) -> None:
    torch.manual_seed(0)
    model, photographs = LeNet5(10, (3, 32, 32)), Photographs(num_clients=2, images_per_client=4, image_size=32)
    photographs.setup("fit")
    images = torch.cat([client.images for client in photographs.clients])
    found = feature_scale(model.embed(images).detach() / factor, model, FeatureDecoder(model, (3, 32, 32)))
    assert found == pytest.approx(factor, rel=0.25)


@pytest.mark.parametrize("seed", [0, 1])
def test_features_that_hardly_tell_their_scale_keep_it(seed: int) -> None:
    """Of ResNet9, of which a linear decoder makes coarse images: 1.8 was found at 64 pixels."""
    torch.manual_seed(seed)
    model, photographs = ResNet9(10, (3, 32, 32)).eval(), Photographs(num_clients=2, images_per_client=4, image_size=32)
    photographs.setup("fit")
    images = torch.cat([client.images for client in photographs.clients])
    assert feature_scale(model.embed(images).detach(), model, FeatureDecoder(model, (3, 32, 32))) == 1


def test_features_that_leaked_too_small_are_inverted_all_the_same(observe: Observe, attack: Callable) -> None:
    """The attacker takes the rate for ten times too large, as where updates are clipped to a tenth."""
    training = LocalTraining(lr=0.01, local_epochs=1)
    right = observe(Federation(client=training), Knowledge(), num_classes=50)
    wrong = observe(Federation(client=training), Knowledge(client_lr=0.1), num_classes=50)
    usual, scaled = (attack(FeatureInversion(), seen, steps=5) for seen in (right, wrong))
    assert usual.scale == 1
    assert scaled.scale == pytest.approx(10, rel=0.25)
    cosines = torch.nn.functional.cosine_similarity(usual.features, scaled.features)
    assert cosines.min() > 0.999
    assert scaled.misfit(usual.best, usual.labels).max() < 0.9
    verdict = scaled.verdict(scaled.misfit(scaled.best, scaled.labels))
    assert Level.CERTAIN not in verdict.levels
    assert "too small" in verdict.sentence()
