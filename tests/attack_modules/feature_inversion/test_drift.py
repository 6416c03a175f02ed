from collections.abc import Callable

import pytest
import torch

from attack_modules.feature_inversion.drift import full_batches, simulate_peers
from attack_modules.threat_model.observed import ObservedRound
from attack_modules.threat_model.requirements import RequirementError
from fl_lightning.client import ClientTask, LocalTraining, local_update, parameters
from fl_lightning.data import ImageSet
from fl_lightning.federation import Federation
from fl_lightning.models import LeNet5, TorchvisionClassifier

LABELS, PEERS = torch.tensor([4, 0, 2]), torch.tensor([1, 0, 1])
CPU = torch.device("cpu")


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def update_of(model: LeNet5, pixels: torch.Tensor, peer: int, training: LocalTraining) -> dict[str, torch.Tensor]:
    own = peer == PEERS
    return local_update(ClientTask(model, ImageSet(pixels[own], LABELS[own]), seed=0), training).update


def test_every_peer_moves_its_own_images_alone(observe: Callable[..., ObservedRound], pixels: torch.Tensor) -> None:
    seen = observe(Federation(client=LocalTraining(lr=0.1, local_epochs=2)))
    model = seen.observation.build_model()
    expected = model.embed(pixels / 255).detach()
    for peer in (0, 1):
        own = peer == PEERS
        update = update_of(model, pixels, peer, LocalTraining(lr=0.1, local_epochs=1))
        after = seen.observation.build_model()
        after.load_state_dict({name: value - update[name] for name, value in parameters(model).items()}, strict=False)
        expected[own] = (expected[own] + after.embed(pixels[own] / 255).detach()) / 2
    found = simulate_peers(full_batches(seen, CPU), pixels / 255, LABELS, PEERS, num_images=3).features
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - model.embed(pixels / 255)).abs().max() > 1e-3


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_update_is_that_of_the_federation(
    observe: Callable[..., ObservedRound], pixels: torch.Tensor, batch_size: int | None
) -> None:
    assumed = LocalTraining(lr=0.1, local_epochs=3, momentum=0.5, weight_decay=0.1, batch_size=batch_size)
    seen = observe(Federation(client=assumed), images_per_client=4)
    steps = 3 if batch_size is None else 6
    training = LocalTraining(lr=0.1, local_epochs=steps, momentum=0.5, weight_decay=0.1)
    alone, two = (update_of(seen.observation.build_model(), pixels, peer, training)["head.0.weight"] for peer in (0, 1))
    found = simulate_peers(full_batches(seen, CPU), pixels / 255, LABELS, PEERS, num_images=3)
    torch.testing.assert_close(found.update.dense(), alone / 3 + two * 2 / 3, rtol=1e-4, atol=1e-6)


def test_one_step_is_errors_times_features(observe: Callable[..., ObservedRound], pixels: torch.Tensor) -> None:
    seen = observe(Federation(client=LocalTraining(lr=0.1, local_epochs=1)))
    found = simulate_peers(full_batches(seen, CPU), pixels / 255, LABELS, PEERS, num_images=3)
    torch.testing.assert_close(found.errors.T @ found.features, found.update.dense(), rtol=1e-4, atol=1e-6)


def test_a_model_that_draws_random_numbers_is_refused(observe: Callable[..., ObservedRound]) -> None:
    def alexnet(num_classes: int, image_shape: tuple[int, int, int]) -> TorchvisionClassifier:
        return TorchvisionClassifier(num_classes, image_shape, "alexnet", dropout=0.5)

    seen = observe(Federation(model=alexnet), image_size=64)
    with pytest.raises(RequirementError, match="is random while it trains"):
        full_batches(seen, CPU)
