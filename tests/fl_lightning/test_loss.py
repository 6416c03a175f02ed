"""Label smoothing and class weights, in the clients' loss, in the simulation and in the closed form."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from attack_modules import FeatureInversion
from attack_modules.analytic.counting import class_shares
from attack_modules.analytic.leak import leak
from attack_modules.analytic.observed_head import training_knowledge
from attack_modules.analytic.results import TrainingKnowledge
from attack_modules.analytic.typical_head import TypicalHead
from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.simulation.low_rank import LowRank
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound
from attack_modules.threat_model.requirements import RequirementError
from fl_lightning.client import LocalTraining
from fl_lightning.errors import AuditError, SettingError
from fl_lightning.federation import Federation
from fl_lightning.loss import CrossEntropy, logit_errors

WEIGHTS = [1.0, 3.0, 0.5, 2.0, 1.0, 1.5, 0.7, 1.0, 2.5, 1.0]


@pytest.mark.parametrize("weights", [None, tuple(WEIGHTS)])
def test_the_targets_give_the_gradient_of_torchs_loss(weights: tuple[float, ...] | None) -> None:
    loss = CrossEntropy(0.2, weights)
    logits = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, 0, 1, 1, 8])
    (expected,) = torch.autograd.grad(loss(logits, labels), logits)
    found = logit_errors(logits.softmax(1), loss.targets(labels, 10, logits)) / 5
    torch.testing.assert_close(found, expected)
    apart = loss.targets(labels, 10, logits, [2, 3])
    torch.testing.assert_close(apart[:2], loss.targets(labels[:2], 10, logits))
    summed = loss(logits, labels, reduction="sum") / loss.total(labels)
    torch.testing.assert_close(summed, loss(logits, labels))


@pytest.mark.parametrize("given", [(1.0, None), (-0.1, None), (0.1, (1.0, 0.0)), (float("nan"), None), (0.1, ())])
def test_impossible_losses_are_refused(given: tuple) -> None:
    with pytest.raises(SettingError, match="at least 0 and below 1, the second positive"):
        CrossEntropy(*given)


@pytest.mark.parametrize("merged", [False, True])
def test_the_simulation_has_the_clients_loss(
    observe: Callable[..., ObservedRound], noise_images: type, relative_error: Callable, merged: bool
) -> None:
    training = LocalTraining(lr=0.05, local_epochs=2, label_smoothing=0.2, class_weights=WEIGHTS)
    clients = {"num_clients": 2 if merged else 3}
    seen = observe(Federation(client=training), **clients)
    assert training_knowledge(seen, seen.observation.build_model()).loss == training.loss
    data = noise_images(images_per_client=2, image_size=16, **clients)
    data.setup()
    peers = data.clients[:-1]
    images, labels = torch.cat([p.images for p in peers]), torch.cat([p.labels for p in peers])
    found = SimulatedPeers(seen, merged, torch.device("cpu")).mean_update(images, labels)
    dense = {name: u.dense() if isinstance(u, LowRank) else u for name, u in found.items()}
    assert relative_error(dense, seen.peers_update()) < 2e-3


@pytest.mark.parametrize(("steps", "layers", "error"), [(1, 1, 1e-5), (1, 2, 1e-4), (3, 2, 0.02)])
def test_the_closed_form_reads_features_under_the_told_loss(steps: int, layers: int, error: float) -> None:
    torch.manual_seed(0)
    head = nn.Sequential(*([nn.Linear(90, 40), nn.ReLU(), nn.Linear(40, 10)] if layers == 2 else [nn.Linear(90, 10)]))
    loss, labels = CrossEntropy(0.1, tuple(WEIGHTS)), torch.tensor([1, 4, 8])
    features = torch.rand(3, 90)
    before = {name: tensor.detach().clone() for name, tensor in head.named_parameters()}
    optimiser = torch.optim.SGD(head.parameters(), lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(head(features), labels).backward()
        optimiser.step()
    update = {name: before[name] - tensor.detach() for name, tensor in head.named_parameters()}
    found = leak(update, before, TrainingKnowledge(0.02, steps, 3, labels, loss=loss, sizes=[3]))
    assert ((found.features - features).norm(dim=1) / features.norm(dim=1)).max() < error
    untold = leak(update, before, TrainingKnowledge(0.02, steps, 3, labels))
    assert ((untold.features - features).norm(dim=1) / features.norm(dim=1)).max() > 0.1


@pytest.mark.parametrize("loss", [CrossEntropy(0.3), CrossEntropy(0.0, (1.0, 4.0, 2.0, 0.5))])
def test_shares_of_common_classes_are_read_through_smoothing_or_weights(loss: CrossEntropy) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([6, 1, 3, 2])
    labels = torch.arange(4).repeat_interleave(counts)
    probabilities = (0.05 * torch.randn(12, 4)).softmax(1).double()
    rows = logit_errors(probabilities, loss.targets(labels, 4, probabilities)).mean(0)
    weights = torch.ones(4) if loss.class_weights is None else loss.weights(rows)
    typical = TypicalHead(probabilities.mean(0) / weights, 1.0)
    bias = torch.stack([torch.zeros(4), rows / weights], 1)
    found = class_shares(bias, 1, typical, loss.label_smoothing) * 12
    assert found.round().long().tolist() == counts.tolist()


def test_weights_must_be_as_many_as_classes(observe: Callable[..., ObservedRound]) -> None:
    with pytest.raises(SettingError, match="has 2 numbers, but there are 10 classes"):
        observe(Federation(client=LocalTraining(class_weights=[1.0, 2.0])))
    seen = observe(Federation(), Knowledge(class_weights=[1.0, 2.0]))
    with pytest.raises(RequirementError, match="has 2 numbers for 10 classes"):
        FeatureInversion().reconstruct(seen.observation, seen.assumptions, steps=1)
    for wrong in ({"class_weights": [1.0, -1.0]}, {"label_smoothing": 1.0}):
        with pytest.raises(AuditError):
            Knowledge(**wrong)
