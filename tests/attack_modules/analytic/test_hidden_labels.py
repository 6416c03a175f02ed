"""Labels under a head of several layers."""

import torch
from torch.nn import functional as F

from attack_modules.analytic.hidden_labels import hidden_labels


def test_labels_of_three_layers_follow_from_local_steps_of_shared_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(15) % 4
    inputs = torch.cat([torch.randn(15, 40, generator=generator).relu(), torch.ones(15, 1)], 1)
    weights = [torch.randn(*shape, generator=generator) / shape[1] ** 0.5 for shape in ((24, 41), (20, 25), (4, 21))]
    rounds, gradients = [], []
    for _ in range(3):
        rounds.append(weights)
        for _ in range(2):
            trained = [weight.clone().requires_grad_() for weight in weights]
            outputs = inputs
            for weight in trained[:-1]:
                outputs = torch.cat([(outputs @ weight.T).relu(), torch.ones(15, 1)], 1)
            loss = F.cross_entropy(outputs @ trained[-1].T, labels)
            weights = [w - 0.1 * g for w, g in zip(weights, torch.autograd.grad(loss, trained), strict=True)]
        gradients.append((rounds[-1][0] - weights[0]) / 0.1)
    assert torch.equal(hidden_labels(inputs[:, :-1], torch.stack(gradients), rounds), labels)
