"""The same step, done plainly: all weights and gradients whole, float32, one double backward pass.

It is what the reference implementation of arXiv 2410.04661 computes in one evaluation of its closure, without that
implementation's copies of the model; one of its steps evaluates the closure twice.
"""

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from fl_lightning.client import Tensors, parameters
from fl_lightning.observation import Observation


def dense_loss(observation: Observation, images: Tensor, labels: Tensor, target: Tensors) -> Tensor:
    """`|simulated - observed|^2 / |observed|^2` of one merged client with full batches.

    Args:
        observation: gives the global model and the believed learning rate and local epochs.
        images: (N, C, H, W) in [0, 1], differentiable.
        labels: (N,) long.
        target: the observed update by parameter name.
    """
    model = observation.build_model()
    start = {name: tensor.requires_grad_() for name, tensor in parameters(model).items()}
    weights = start
    for _ in range(observation.beliefs.local_epochs):
        loss = F.cross_entropy(functional_call(model, weights, (images,)), labels)
        gradient = torch.autograd.grad(loss, weights.values(), create_graph=True)
        weights = {
            name: weight - observation.beliefs.client_lr * g
            for (name, weight), g in zip(weights.items(), gradient, strict=True)
        }
    error = sum((start[name] - weights[name] - target[name]).square().sum() for name in target)
    return error / sum(tensor.square().sum() for tensor in target.values())
