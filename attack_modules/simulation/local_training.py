"""The peers' local training, simulated so that it can be differentiated with respect to the images."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from attack_modules.simulation.distributed import Ranks
from attack_modules.simulation.feature_map import for_speed
from attack_modules.simulation.low_rank import LowRank, SimulatedUpdate
from attack_modules.simulation.recomputation import recomputed
from attack_modules.threat_model.observed import ObservedRound, RoundsSummary
from attack_modules.threat_model.requirements import (
    KnownClientSizes,
    KnownLabelsByPeer,
    NoBatchNorm,
    NoRandomLayers,
    Requirement,
    SeparableModel,
    check,
)
from fl_lightning.client import Tensors, buffers, parameters
from fl_lightning.errors import counted
from fl_lightning.models import ImageClassifier


class Batch(NamedTuple):
    """The part of a mini-batch that this process trains on."""

    inputs: Tensor
    """(b, C, H, W) images, or (b, D) features where the convolutions are frozen."""
    labels: Tensor
    """(b,) long."""
    total: float
    """What the sum of the losses of the whole mini-batch is divided by: its images, or their weights."""


class SimulatedPeers:
    """The peers' local SGD from the observed global model, on candidate images.

    Several processes divide the clients among them; a single merged client's batches are divided instead.

    With `frozen`, only the head's training is simulated, exactly, on features that this model computes once. The
    attacker knows where the convolutions went, so only the differences between peers are lost, at a fraction of the
    cost.

    Args:
        observed: the observed round: the global model `w_t`, and how the peers are assumed to train.
        merged: whether one virtual client holds all images (as in the paper) or each assumed client its own.
        device: where to simulate.
        ranks: the processes that simulate together.
        chunk_size: images whose activations of one local step are kept in memory at once; they are recomputed in the
            backward pass. None keeps those of all images and steps.
        frozen: a model that computes the features for the whole training; None to train the convolutions too.
        offset: (D,) added to the features of every image; None for nothing.

    Raises:
        RequirementError: the model is not `head(features)` or has random layers, client sizes are needed and unknown,
            or the work cannot be divided into chunks or among the processes.
    """

    def __init__(
        self,
        observed: ObservedRound,
        merged: bool,
        device: torch.device,
        ranks: Ranks | None = None,
        chunk_size: int | None = None,
        frozen: ImageClassifier | None = None,
        offset: Tensor | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        required = self.requirements(merged, chunk_size, self.ranks.count)
        check(required, RoundsSummary.of([observed]), "The simulation of local training")
        self.model = for_speed(observed.observation.build_model(shared=True), device)
        self.frozen, self.offset = frozen, offset
        self.assumptions = observed.assumptions
        self.client_sizes = None if merged else self.assumptions.client_sizes
        self.chunk_size = chunk_size
        trained = {name for name, tensor in self.model.named_parameters() if tensor.requires_grad}
        trained &= trained if frozen is None else set(self.model.head_parameters)
        self.parameters = {name: tensor for name, tensor in parameters(self.model).items() if name in trained}
        linear = {f"{name}.weight" for name, layer in self.model.head_layers if type(layer) is nn.Linear}
        self.linear_weights = linear & self.parameters.keys()

    @staticmethod
    def requirements(merged: bool, chunk_size: int | None = None, processes: int = 1) -> list[Requirement]:
        """What a simulation requires of the observed rounds, given the constructor's arguments."""
        divided = chunk_size is not None or (merged and processes > 1)
        return [
            SeparableModel(),
            NoRandomLayers(),
            *([] if merged else [KnownClientSizes(processes), KnownLabelsByPeer()]),
            *([NoBatchNorm()] if divided else []),
        ]

    def introduction(self) -> str:
        """What is simulated, and which linear layers' updates are kept as low-rank factors."""
        if self.frozen is not None:
            return "Only the head's training is simulated; the convolutions are frozen half way between the two models."
        in_head = set(self.model.head)
        elsewhere = sum(isinstance(m, nn.Linear) and m not in in_head for m in self.model.features.modules())
        dense = f"; {elsewhere} more, outside the head, are simulated densely" if elsewhere else ""
        layers = counted(len(self.linear_weights), "linear layer")
        return f"The updates of {layers} of the head are low-rank factors{dense}."

    def mean_update(self, images: Tensor, labels: Tensor) -> SimulatedUpdate:
        """The mean of the simulated clients' updates, weighted by their numbers of images.

        Every process gets the whole mean; see `Ranks` for how it is differentiated.

        Args:
            images: (N, C, H, W) in [0, 1], ordered by client.
            labels: (N,) long.

        Returns:
            Parameters before minus after by name, differentiable with respect to `images`.
        """
        if self.client_sizes is None:
            return self._local_update(images, labels)
        clients = list(zip(images.split(self.client_sizes), labels.split(self.client_sizes), strict=True))
        mean: SimulatedUpdate = {}
        for client in self.ranks.shard(len(clients)).tolist():
            own_images, own_labels = clients[client]
            for name, update in self._local_update(own_images, own_labels).items():
                share = (len(own_images) / len(images)) * update
                mean[name] = mean[name] + share if name in mean else share
        return self.ranks.reduce_update(mean)

    def _local_update(self, images: Tensor, labels: Tensor) -> SimulatedUpdate:
        """One client's update: the sum of its SGD steps (`torch.optim.SGD` with momentum and weight decay)."""
        # BatchNorm updates its buffers in place.
        state = {name: tensor.clone() for name, tensor in buffers(self.model.features).items()}
        start = {
            name: LowRank(tensor, 1.0) if name in self.linear_weights else tensor
            for name, tensor in self.parameters.items()
        }
        weights, velocity = start, None
        for batch in self.assumptions.local_epochs * self._batches(images, labels):
            gradient = self._batch_gradient(weights, state, batch)
            if self.assumptions.weight_decay:
                gradient = {name: g + self.assumptions.weight_decay * weights[name] for name, g in gradient.items()}
            if self.assumptions.momentum and velocity:
                gradient = {name: g + self.assumptions.momentum * velocity[name] for name, g in gradient.items()}
            velocity = gradient
            weights = {name: weight - self.assumptions.client_lr * velocity[name] for name, weight in weights.items()}
        return {name: start[name] - weight for name, weight in weights.items()}

    def _batches(self, images: Tensor, labels: Tensor) -> list[Batch]:
        """An epoch's mini-batches in a fixed order, since the peers' own order is unknown.

        A merged client takes as many steps as one peer does, in batches that are larger by the number of peers.
        """
        steps = self.assumptions.local_steps // self.assumptions.local_epochs
        merged = self.client_sizes is None
        size = math.ceil(len(images) / steps) if merged else self.assumptions.batch_size or len(images)
        batches = []
        for inputs, targets in zip(images.split(size), labels.split(size), strict=True):
            total = self.assumptions.loss.total(targets)
            if self._divides_batches:
                own = self.ranks.shard(len(inputs)).to(images.device)
                inputs, targets = inputs[own], targets[own]
            batches.append(Batch(inputs if self.frozen is None else self._frozen_features(inputs), targets, total))
        return batches

    @property
    def _divides_batches(self) -> bool:
        """Whether each process computes a part of every batch, because there is a single merged client."""
        return self.client_sizes is None and self.ranks.count > 1

    def _frozen_features(self, images: Tensor) -> Tensor:
        """(b, C, H, W) images -> (b, D) features of the frozen model."""
        if self.chunk_size is None:
            return self._with_offset(self.frozen.embed(images))
        chunks = [checkpoint(self.frozen.embed, chunk, use_reentrant=False) for chunk in images.split(self.chunk_size)]
        return self._with_offset(torch.cat(chunks))

    def _with_offset(self, features: Tensor) -> Tensor:
        return features if self.offset is None else features + self.offset

    def _batch_gradient(self, weights: SimulatedUpdate, state: Tensors, batch: Batch) -> SimulatedUpdate:
        """The gradient of a batch's mean loss; of a merged client, each process computes a part."""
        gradient = self._own_gradient(weights, state, batch)
        return self.ranks.reduce_update(gradient) if self._divides_batches else gradient

    def _own_gradient(self, weights: SimulatedUpdate, state: Tensors, batch: Batch) -> SimulatedUpdate:
        """This process's part of a batch's gradient, a chunk of images at a time."""
        inputs, labels, total = batch
        if self.chunk_size is None or self.frozen is not None:
            return self._gradient(weights, inputs, state, labels, total)
        gradient: SimulatedUpdate = {}
        for chunk, chunk_labels in zip(inputs.split(self.chunk_size), labels.split(self.chunk_size), strict=True):
            part = recomputed(partial(self._gradient, state=state, labels=chunk_labels, total=total), weights, chunk)
            gradient = {name: gradient[name] + g if gradient else g for name, g in part.items()}
        return {name: g.joined() if isinstance(g, LowRank) else g for name, g in gradient.items()}

    def _features(self, weights: SimulatedUpdate, state: Tensors, images: Tensor) -> Tensor:
        """(b, C, H, W) images -> (b, D) features under the current weights."""
        convolutional = {inner: weights[name] for name, inner in self.model.feature_names(weights).items()}
        normalised = self.model.normalise(images)
        return self._with_offset(functional_call(self.model.features, (convolutional, state), (normalised,)).flatten(1))

    def _gradient(
        self, weights: SimulatedUpdate, inputs: Tensor, state: Tensors, labels: Tensor, total: float
    ) -> SimulatedUpdate:
        """The gradient of `sum of losses / total` for all parameters; that of linear weights as low-rank factors.

        It is itself differentiable where gradients are enabled.
        """
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            weights = {
                name: weight
                if isinstance(weight, LowRank) or weight.requires_grad
                else weight.detach().requires_grad_()
                for name, weight in weights.items()
            }
            x = inputs if self.frozen is not None else self._features(weights, state, inputs)
            if not x.requires_grad:  # no gradient is asked of the images, but the head's outputs need a graph
                x = x.detach().requires_grad_()
            seen, outputs = {}, {}
            for layer_name, layer in self.model.head_layers:
                prefix = f"{layer_name}."
                own = {n.removeprefix(prefix): weight for n, weight in weights.items() if n.startswith(prefix)}
                name = f"{prefix}weight"
                if name not in self.linear_weights:
                    x = functional_call(layer, own, (x,))
                    continue
                seen[name] = x if differentiable else x.detach()
                outputs[name] = x = own["weight"].linear(x)
                if layer.bias is not None:
                    x = x + own.get("bias", layer.bias)
            loss = self.assumptions.loss(x, labels, reduction="sum") / total
            sources = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)} | outputs
            slopes = torch.autograd.grad(  # a parameter without influence has the gradient 0
                loss, sources.values(), create_graph=differentiable, materialize_grads=True
            )
        gradient = dict(zip(sources, slopes, strict=True))
        for name, inputs_seen in seen.items():
            gradient[name] = LowRank(self.parameters[name], 0.0, (gradient[name],), (inputs_seen,))
        return gradient
