import torch

from attack_modules.feature_drift import simulate_peers
from fl_lightning.client import ClientTask, LocalTraining, local_update, parameters
from fl_lightning.data import ImageSet
from fl_lightning.knowledge import Beliefs
from fl_lightning.models import LeNet5

LABELS, PEERS = torch.tensor([4, 0, 2]), torch.tensor([1, 0, 1])


def scene() -> tuple[LeNet5, torch.Tensor]:
    torch.manual_seed(0)
    return LeNet5(5, (3, 16, 16)), torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)


def beliefs(steps: int, momentum: float = 0.0, weight_decay: float = 0.0) -> Beliefs:
    return Beliefs(0.1, 1.0, steps, None, momentum, weight_decay, None, None, None, None)


def update_of(model: LeNet5, pixels: torch.Tensor, peer: int, training: LocalTraining) -> dict[str, torch.Tensor]:
    own = peer == PEERS
    return local_update(ClientTask(model, ImageSet(pixels[own], LABELS[own]), seed=0), training).update


def test_every_peer_moves_its_own_images_alone() -> None:
    model, pixels = scene()
    expected = model.embed(pixels / 255).detach()
    for peer in (0, 1):
        own = peer == PEERS
        update = update_of(model, pixels, peer, LocalTraining(lr=0.1, local_epochs=1))
        after = LeNet5(5, (3, 16, 16))
        after.load_state_dict({name: value - update[name] for name, value in parameters(model).items()}, strict=False)
        expected[own] = (expected[own] + after.embed(pixels[own] / 255).detach()) / 2
    found = simulate_peers(model, pixels / 255, LABELS, PEERS, beliefs(2), num_images=3).features
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - model.embed(pixels / 255)).abs().max() > 1e-3


def test_the_update_is_that_of_the_federation() -> None:
    model, pixels = scene()
    training = LocalTraining(lr=0.1, local_epochs=3, momentum=0.5, weight_decay=0.1)
    alone, two = (update_of(model, pixels, peer, training)["head.0.weight"] for peer in (0, 1))
    found = simulate_peers(model, pixels / 255, LABELS, PEERS, beliefs(3, 0.5, 0.1), num_images=3)
    torch.testing.assert_close(found.update, alone / 3 + two * 2 / 3, rtol=1e-4, atol=1e-6)


def test_one_step_is_errors_times_features() -> None:
    model, pixels = scene()
    found = simulate_peers(model, pixels / 255, LABELS, PEERS, beliefs(1), num_images=3)
    torch.testing.assert_close(found.errors.T @ found.features, found.update, rtol=1e-4, atol=1e-6)
