"""The peers' local training, simulated so that one can differentiate through it."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from attack_modules.simulation.distributed import Ranks
from attack_modules.simulation.feature_map import for_speed
from attack_modules.simulation.low_rank import LowRank, SimulatedUpdate
from attack_modules.simulation.recomputation import recomputed
from fl_lightning.client import Tensors, buffers, parameters
from fl_lightning.errors import AuditError
from fl_lightning.models import ImageClassifier
from fl_lightning.observation import Observation


class SimulationError(AuditError):
    """The observed model, or what the attacker believes of its peers, cannot be simulated."""


class Batch(NamedTuple):
    """The part of a mini-batch that this process trains on."""

    inputs: Tensor
    """(b, C, H, W) images, or (b, D) features where those are not trained."""
    labels: Tensor
    """(b,) long."""
    size: int
    """Images in the whole mini-batch."""


class SimulatedPeers:
    """The peers' local SGD from the observed global model, on images that the attacker makes up.

    Several processes divide the clients among them; if there is one merged client, they divide its every batch.

    With `held`, only the head's training is simulated, exactly, and images pass through the convolutions of that model
    once. The attacker observes where these went, so that of the features' drift only the peers' differences are lost;
    a step costs a small part.

    Args:
        observation: gives the global model `w_t` and the attacker's beliefs of the peers' training.
        merged: whether one virtual client holds all images (the paper's way) or each believed client its own.
        device: where to simulate.
        ranks: the processes that simulate together.
        chunk_size: images whose activations are kept in memory at once, of one local step; all are computed again when
            they are differentiated. None for all, of all steps.
        held: a model whose features are those of the images all through the training; None to train them too.
        shift: (D,) what is added to the features of every image; None for nothing.

    Raises:
        SimulationError: the model draws random numbers, or client sizes are needed and not believed, or the work
            cannot be divided among the processes or into chunks.
    """

    def __init__(
        self,
        observation: Observation,
        merged: bool,
        device: torch.device,
        ranks: Ranks | None = None,
        chunk_size: int | None = None,
        held: ImageClassifier | None = None,
        shift: Tensor | None = None,
    ) -> None:
        self.model = for_speed(observation.build_model(shared=True), device)
        self.held, self.shift = held, shift
        self.beliefs = observation.beliefs
        random = [
            name for name, m in self.model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p
        ]
        if random:
            raise SimulationError(
                f"The global model drops units at random ({', '.join(random)}), which nobody can simulate exactly. "
                "Train the federation without dropout (`federation.model.dropout: 0`)."
            )
        if not merged and self.beliefs.client_sizes is None:
            raise SimulationError(
                "A simulation client by client needs the number of clients and of images, but the attacker has "
                "neither. Give `knowledge.num_clients` and `knowledge.num_images`, or set `model.merged: true`."
            )
        self.client_sizes = None if merged else self.beliefs.client_sizes
        self.ranks = ranks or Ranks()
        if not merged and len(self.client_sizes) < self.ranks.count:
            raise SimulationError(
                f"{len(self.client_sizes)} client(s) cannot be divided among {self.ranks.count} processes. Set "
                "`model.merged: true`, of which every process takes a part, or lower `trainer.devices`."
            )
        self.chunk_size = chunk_size
        divided = chunk_size is not None or (merged and self.ranks.count > 1)
        if divided and any(isinstance(m, _BatchNorm) for m in self.model.modules()):
            raise SimulationError(
                "A batch of a model with BatchNorm cannot be divided, because its statistics are those of all its "
                "images. Leave `model.chunk_size` out, and on several devices set `model.merged: false`."
            )
        trained = self.model if held is None else nn.ModuleDict({"head": self.model.head})
        self.parameters = parameters(trained)
        self.linear_weights = {f"head.{i}.weight" for i, m in enumerate(self.model.head) if isinstance(m, nn.Linear)}

    def introduction(self) -> str:
        """What is simulated, and which linear layers' updates stay factored, in plain words."""
        if self.held is not None:
            return "Only the head's training is simulated; the convolutions are held half way between the two models."
        elsewhere = sum(isinstance(module, nn.Linear) for module in self.model.features.modules())
        dense = f"; {elsewhere} more, outside the head, are simulated densely" if elsewhere else ""
        return f"The updates of the head's {len(self.linear_weights)} linear layer(s) stay in factors{dense}."

    def mean_update(self, images: Tensor, labels: Tensor) -> SimulatedUpdate:
        """The mean of the simulated clients' updates, weighted by their numbers of images.

        Every process gets all of it; see `Ranks` for its gradient.

        Args:
            images: (N, C, H, W) in [0, 1], client by client.
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
        state = {name: tensor.clone() for name, tensor in buffers(self.model.features).items()}  # BatchNorm writes them
        start = {
            name: LowRank(tensor, 1.0) if name in self.linear_weights else tensor
            for name, tensor in self.parameters.items()
        }
        weights, velocity = start, None
        for batch in self.beliefs.local_epochs * self._batches(images, labels):
            gradient = self._batch_gradient(weights, state, batch)
            if self.beliefs.weight_decay:
                gradient = {name: g + self.beliefs.weight_decay * weights[name] for name, g in gradient.items()}
            if self.beliefs.momentum and velocity:
                gradient = {name: g + self.beliefs.momentum * velocity[name] for name, g in gradient.items()}
            velocity = gradient
            weights = {name: weight - self.beliefs.client_lr * velocity[name] for name, weight in weights.items()}
        return {name: start[name] - weight for name, weight in weights.items()}

    def _batches(self, images: Tensor, labels: Tensor) -> list[Batch]:
        """An epoch's mini-batches in one fixed order: the peers' own is unknown, and any image may be in any batch."""
        size = self.beliefs.batch_size or len(images)
        batches = []
        for inputs, targets in zip(images.split(size), labels.split(size), strict=True):
            whole = len(inputs)
            if self._divides_batches:
                own = self.ranks.shard(whole).to(images.device)
                inputs, targets = inputs[own], targets[own]
            batches.append(Batch(inputs if self.held is None else self._held_features(inputs), targets, whole))
        return batches

    @property
    def _divides_batches(self) -> bool:
        """Whether several processes compute a part each of every batch, since there is but one merged client."""
        return self.client_sizes is None and self.ranks.count > 1

    def _held_features(self, images: Tensor) -> Tensor:
        """(b, C, H, W) images -> (b, D) features of the model that is held."""
        if self.chunk_size is None:
            return self._shifted(self.held.embed(images))
        chunks = [checkpoint(self.held.embed, chunk, use_reentrant=False) for chunk in images.split(self.chunk_size)]
        return self._shifted(torch.cat(chunks))

    def _shifted(self, features: Tensor) -> Tensor:
        return features if self.shift is None else features + self.shift

    def _batch_gradient(self, weights: SimulatedUpdate, state: Tensors, batch: Batch) -> SimulatedUpdate:
        """The gradient of a batch's mean loss, of which a merged client's processes compute a part each."""
        gradient = self._own_gradient(weights, state, batch)
        return self.ranks.reduce_update(gradient) if self._divides_batches else gradient

    def _own_gradient(self, weights: SimulatedUpdate, state: Tensors, batch: Batch) -> SimulatedUpdate:
        """This process's part of a batch's gradient, a chunk of images at a time."""
        inputs, labels, size = batch
        if self.chunk_size is None or self.held is not None:
            return self._gradient(weights, inputs, state, labels, size)
        gradient: SimulatedUpdate = {}
        for chunk, chunk_labels in zip(inputs.split(self.chunk_size), labels.split(self.chunk_size), strict=True):
            part = recomputed(
                partial(self._gradient, state=state, labels=chunk_labels, batch_size=size), weights, chunk
            )
            gradient = {name: gradient[name] + g if gradient else g for name, g in part.items()}
        return {name: g.joined() if isinstance(g, LowRank) else g for name, g in gradient.items()}

    def _features(self, weights: SimulatedUpdate, state: Tensors, images: Tensor) -> Tensor:
        """(b, C, H, W) images -> (b, D) features of the model as it is trained."""
        convolutional = {n.removeprefix("features."): w for n, w in weights.items() if n.startswith("features.")}
        normalised = self.model.normalise(images)
        return self._shifted(functional_call(self.model.features, (convolutional, state), (normalised,)).flatten(1))

    def _gradient(
        self, weights: SimulatedUpdate, inputs: Tensor, state: Tensors, labels: Tensor, batch_size: int
    ) -> SimulatedUpdate:
        """The gradient of `sum of losses / batch_size` with respect to all parameters, of linear weights in factors.

        It can itself be differentiated where gradients are enabled.
        """
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            weights = {
                name: weight
                if isinstance(weight, LowRank) or weight.requires_grad
                else weight.detach().requires_grad_()
                for name, weight in weights.items()
            }
            x = inputs if self.held is not None else self._features(weights, state, inputs)
            if not x.requires_grad:  # of images that ask for no gradient: the head's outputs must know their origin
                x = x.detach().requires_grad_()
            seen, outputs = {}, {}
            for index, layer in enumerate(self.model.head):
                name = f"head.{index}.weight"
                if name not in weights:
                    x = layer(x)
                    continue
                seen[name] = x if differentiable else x.detach()
                outputs[name] = x = weights[name].linear(x)
                if layer.bias is not None:
                    x = x + weights[f"head.{index}.bias"]
            loss = F.cross_entropy(x, labels, reduction="sum") / batch_size
            sources = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)} | outputs
            slopes = torch.autograd.grad(loss, sources.values(), create_graph=differentiable)
        gradient = dict(zip(sources, slopes, strict=True))
        for name, inputs_seen in seen.items():
            gradient[name] = LowRank(self.parameters[name], 0.0, (gradient[name],), (inputs_seen,))
        return gradient
