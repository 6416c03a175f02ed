"""Who trained together, from the errors of several full-batch steps of a head."""

import torch
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.drifting_peers import HeadSteps, coupling_of, drifting_peers

CLASSES, WIDTH, ROUNDS, RATE, STEPS = 4, 64, 8, 0.02, 3
PEERS = torch.tensor([0, 1, 1, 2, 0, 2, 0, 2, 1, 2])


def trained(peers: Tensor, steps: int = STEPS) -> tuple[HeadSteps, Tensor]:
    """Each peer trains a head of its own; the summed errors of its images."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(len(peers), WIDTH, generator=generator, dtype=torch.float64).relu()
    targets = F.one_hot(torch.randint(CLASSES, (len(peers),), generator=generator), CLASSES).double()
    weight = 0.1 * torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    logits, observed = [], []
    for _ in range(ROUNDS):
        logits.append(weight @ features.T)
        errors, update = torch.zeros(CLASSES, len(peers), dtype=torch.float64), torch.zeros_like(weight)
        for peer in peers.unique():
            own, local = peers == peer, weight
            for _ in range(steps):
                error = (features[own] @ local.T).softmax(1) - targets[own]
                errors[:, own] += error.T
                local = local - RATE * error.T @ features[own] / own.sum()
            update += (weight - local) * own.sum() / len(peers)
        observed.append(errors)
        weight = weight - update
    presence = torch.ones(ROUNDS, len(peers), dtype=torch.bool)
    return HeadSteps(torch.stack(logits), features @ features.T, targets.T, presence, RATE, steps), torch.stack(
        observed
    )


def test_peers_of_several_sizes_are_found_without_their_number() -> None:
    training, errors = trained(PEERS)
    torch.testing.assert_close(training.simulate(coupling_of(PEERS))[0], errors)
    found = drifting_peers(training, errors)
    assert found.explained
    assert torch.equal(found.peers[:, None] == found.peers, PEERS[:, None] == PEERS)


def test_training_that_is_not_as_assumed_is_not_explained() -> None:
    training, errors = trained(PEERS)
    generator = torch.Generator().manual_seed(0)
    assert not drifting_peers(training, errors + 0.02 * torch.randn(errors.shape, generator=generator)).explained
    training, errors = trained(torch.zeros_like(PEERS))
    single = drifting_peers(training, errors)
    assert not single.peers.any()
    assert single.explained
