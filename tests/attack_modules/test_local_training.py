from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from attack_modules.local_training import SimulatedPeers, SimulationError
from attack_modules.low_rank import LowRank
from fl_lightning.client import LocalTraining, parameters
from fl_lightning.federation import Federation
from fl_lightning.knowledge import Knowledge
from fl_lightning.models import VGG7, ClassifierFactory, LeNet5, ResNet9
from fl_lightning.observation import Observation

Observe = Callable[..., Observation]
CPU = torch.device("cpu")


def dense(update: dict[str, Tensor | LowRank]) -> dict[str, Tensor]:
    return {name: tensor.dense() if isinstance(tensor, LowRank) else tensor for name, tensor in update.items()}


def truth_of(observation: Observation, observe: Observe, noise_images: type) -> tuple[Tensor, Tensor]:
    data = noise_images(num_clients=3, images_per_client=2, image_size=16)
    data.setup()
    peers = data.clients[:2]
    return torch.cat([p.images for p in peers]), torch.cat([p.labels for p in peers])


@pytest.mark.parametrize("model", [LeNet5, VGG7, ResNet9])
@pytest.mark.parametrize(
    "training",
    [
        LocalTraining(lr=0.1, local_epochs=1),
        LocalTraining(lr=0.1, local_epochs=3),
        LocalTraining(lr=0.05, local_epochs=3, momentum=0.9, weight_decay=0.1),
    ],
)
def test_simulated_peers_give_what_real_clients_gave(
    observe: Observe, noise_images: type, relative_error: Callable, model: ClassifierFactory, training: LocalTraining
) -> None:
    observation = observe(Federation(model=model, client=training))
    images, labels = truth_of(observation, observe, noise_images)
    simulated = SimulatedPeers(observation, merged=False, device=CPU).mean_update(images, labels)
    # The observed update is a difference of float32 weights: 1e-7 of a weight is 1e-4 of a small update.
    assert relative_error(dense(simulated), observation.peers_update()) < 2e-3


def test_batch_norm_in_train_mode_is_simulated(
    observe: Observe, noise_images: type, relative_error: Callable, batch_norm_classifier: ClassifierFactory
) -> None:
    observation = observe(Federation(model=batch_norm_classifier, client=LocalTraining(lr=0.1)))
    images, labels = truth_of(observation, observe, noise_images)
    simulated = SimulatedPeers(observation, merged=False, device=CPU).mean_update(images, labels)
    assert relative_error(dense(simulated), observation.peers_update()) < 2e-3


def test_factored_simulation_equals_the_dense_one_forward_and_backward(observe: Observe) -> None:
    """An independent dense reading: mini-batches, momentum and weight decay through functional calls."""
    training = LocalTraining(lr=0.2, local_epochs=2, batch_size=2, momentum=0.5, weight_decay=0.05)
    observation = observe(Federation(client=training), num_clients=2, images_per_client=[4, 1])
    peers = SimulatedPeers(observation, merged=True, device=CPU)
    images = torch.rand(4, 3, 16, 16, requires_grad=True)
    labels = torch.tensor([1, 1, 0, 7])

    model = observation.build_model()
    weights = {name: tensor.requires_grad_() for name, tensor in parameters(model).items()}
    start, velocity = weights, dict.fromkeys(weights, 0.0)
    for _ in range(2):
        for batch in (slice(0, 2), slice(2, 4)):
            loss = F.cross_entropy(functional_call(model, weights, (images[batch],)), labels[batch])
            gradient = torch.autograd.grad(loss, weights.values(), create_graph=True)
            for (name, weight), g in zip(list(weights.items()), gradient, strict=True):
                velocity[name] = 0.5 * velocity[name] + g + 0.05 * weight
                weights = {**weights, name: weight - 0.2 * velocity[name]}
    expected = {name: start[name] - weights[name] for name in start}

    found = dense(peers.mean_update(images, labels))
    direction = {name: torch.randn_like(tensor) for name, tensor in expected.items()}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    slopes = [
        torch.autograd.grad(sum((u[n] * direction[n]).sum() for n in direction), images, retain_graph=True)[0]
        for u in (found, expected)
    ]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5 * float(slopes[1].abs().max()))


def test_a_guessed_client_lr_is_the_one_that_is_simulated(observe: Observe, relative_error: Callable) -> None:
    known, guessed = (
        observe(Federation(client=LocalTraining(local_epochs=1)), Knowledge(client_lr=lr)) for lr in ("known", 0.006)
    )
    images, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    right, wrong = (dense(SimulatedPeers(o, True, CPU).mean_update(images, labels)) for o in (known, guessed))
    assert relative_error({name: u / 2 for name, u in wrong.items()}, right) < 1e-3


def test_dropout_and_unknown_client_sizes_are_refused(observe: Observe) -> None:
    from fl_lightning.models import TorchvisionClassifier

    def with_dropout(num_classes: int, image_shape: tuple[int, int, int]) -> TorchvisionClassifier:
        return TorchvisionClassifier(num_classes, image_shape, name="mobilenet_v3_small", dropout=0.2)

    seen = observe(Federation(model=with_dropout, client=LocalTraining(local_epochs=1)), image_size=32)
    with pytest.raises(SimulationError, match=r"drops units at random.*dropout: 0"):
        SimulatedPeers(seen, True, CPU)
    blind = observe(Federation(), Knowledge(num_clients="inferred"))
    with pytest.raises(SimulationError, match="client by client"):
        SimulatedPeers(blind, False, CPU)
