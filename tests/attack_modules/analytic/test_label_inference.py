from collections.abc import Callable

import pytest
import torch

from attack_modules.analytic.label_inference import infer_labels, infer_num_images, pink_noise
from attack_modules.attack import AttackError
from fl_lightning.client import LocalTraining
from fl_lightning.federation import Federation
from fl_lightning.knowledge import Knowledge
from fl_lightning.models import ClassifierFactory
from fl_lightning.observation import Observation

Observe = Callable[..., Observation]
BLIND = Knowledge(labels="inferred", label_counts="inferred")
SHY = LocalTraining(lr=0.003, local_epochs=1)


def test_distinct_classes_among_many(observe: Observe) -> None:
    seen = observe(Federation(client=SHY), BLIND, num_classes=100, images_per_client=4)
    assert infer_labels(seen, seen.peers_update()).tolist() == list(range(8))


def test_counts_with_a_bias_are_exact(observe: Observe, linear_classifier: ClassifierFactory) -> None:
    seen = observe(Federation(model=linear_classifier, client=SHY), BLIND, images_per_client=12, num_clients=2)
    assert infer_labels(seen, seen.peers_update()).tolist() == sorted(i % 10 for i in range(12))


def test_number_of_images_is_the_rank(observe: Observe) -> None:
    unknown = Knowledge(labels="inferred", label_counts="inferred", num_images="inferred")
    seen = observe(Federation(client=SHY), unknown, num_classes=100, images_per_client=5)
    assert seen.beliefs.num_images is None
    assert infer_num_images(seen, seen.peers_update()) == 10
    assert len(infer_labels(seen, seen.peers_update())) == 10


def test_a_narrow_head_cannot_tell_the_number(observe: Observe, linear_classifier: ClassifierFactory) -> None:
    unknown = Knowledge(labels="inferred", label_counts="inferred", num_images="inferred")
    seen = observe(Federation(model=linear_classifier, client=SHY), unknown, images_per_client=12)
    with pytest.raises(AttackError, match=r"Give a guess as `knowledge\.num_images`"):
        infer_labels(seen, seen.peers_update())


def test_pink_noise_has_a_photographs_spectrum() -> None:
    images = pink_noise(32, (1, 64, 64))
    assert images.min() >= 0
    assert images.max() <= 1
    power = torch.fft.fft2(images).abs().square().mean((0, 1))
    ratio = power[0, 2:5].mean() / power[0, 16:29].mean()  # amplitude 1/f: power falls by (22 / 3)^2 = 54
    assert 20 < ratio < 150
