"""The yardstick: a matching step with dense weights and gradients, float32, one double backward pass.

The reference implementation of arXiv 2410.04661 computes this in one evaluation of its closure, plus copies of the
model; each of its steps evaluates the closure twice.
"""

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.client import Tensors, parameters


def dense_loss(seen: ObservedRound, images: Tensor, labels: Tensor, target: Tensors) -> Tensor:
    """`|simulated - observed|^2 / |observed|^2` of one merged client with full batches.

    Args:
        seen: gives the global model, and the assumed learning rate and local epochs.
        images: (N, C, H, W) in [0, 1], differentiable.
        labels: (N,) long.
        target: the observed update by parameter name.
    """
    model = seen.observation.build_model()
    start = {name: tensor.requires_grad_() for name, tensor in parameters(model).items()}
    weights = start
    for _ in range(seen.assumptions.local_epochs):
        loss = F.cross_entropy(functional_call(model, weights, (images,)), labels)
        gradient = torch.autograd.grad(loss, weights.values(), create_graph=True)
        weights = {
            name: weight - seen.assumptions.client_lr * g
            for (name, weight), g in zip(weights.items(), gradient, strict=True)
        }
    error = sum((start[name] - weights[name] - target[name]).square().sum() for name in target)
    return error / sum(tensor.square().sum() for tensor in target.values())
