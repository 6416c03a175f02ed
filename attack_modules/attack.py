"""What all attacks share: they take Observations and end with images and labels."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from attack_modules.simulation.distributed import Ranks
from fl_lightning.client import Tensors
from fl_lightning.errors import AuditError
from fl_lightning.observation import Observation


class Reconstruction(NamedTuple):
    """What an attack ends with, in an order of its own."""

    images: Tensor
    """(N, C, H, W) float in [0, 1]."""
    labels: Tensor
    """(N,) long."""
    latent_downscale: int = 1
    """The images were found this much smaller and upsampled (bicubic); 1 if at full resolution."""
    num_classes: int | None = None
    """Number of classes of the attacked model, None if it is not known."""
    disagreement: Callable[[Tensor, Tensor], Tensor] | None = None
    """(n, C, H, W) other images, and (n,) which of these reconstructions they are to replace -> (n,): how much what was
    observed speaks against each, less is better. None where the attack cannot tell it an image at a time."""
    peers: Tensor | None = None
    """(N,) long, images with one number were trained by one peer as far as it shows; None if the attack cannot tell."""
    numbers: Tensor | None = None
    """(N,) long, by which an image draws its random numbers; None for 0 to N - 1."""

    def part(self, indices: Tensor) -> "Reconstruction":
        """The reconstructions of these numbers (n,), which stay what they are."""
        told = self.disagreement
        return self._replace(
            images=self.images[indices],
            labels=self.labels[indices],
            peers=None if self.peers is None else self.peers[indices],
            disagreement=told and (lambda images, i: told(images, indices.to(i.device)[i])),
            numbers=indices if self.numbers is None else self.numbers[indices],
        )


class AttackError(AuditError):
    """The attack cannot run on this Observation, or a checkpoint belongs to another."""


class Attack(LightningModule, ABC):
    """An attack on the peers of a curious client. Its data is `ObservedRounds`, of which it reads `observations`.

    A subclass builds its parameters in `configure_model`, and gives `reconstruction`.

    Args:
        subtract_own: take the attacker's own update out of the aggregate first.
        checkpoint_every: steps between checkpoints, from which `--ckpt_path` resumes.
    """

    def __init__(self, subtract_own: bool = True, checkpoint_every: int = 10) -> None:
        super().__init__()
        self.subtract_own = subtract_own
        self.checkpoint_every = checkpoint_every

    @abstractmethod
    def reconstruction(self) -> Reconstruction:
        """The best images so far by the attack's own loss, with their labels."""

    @abstractmethod
    def misfit(self, images: Tensor, labels: Tensor) -> Tensor:
        """How far images are from what the update says of them: 0 if it could have come from just these.

        It grows where an enhancement invents what was not observed, and needs no original.

        Args:
            images: (N, C, H, W) in [0, 1], in the order of `reconstruction`.
            labels: (N,) long, theirs.

        Returns:
            Relative distances: (N,) image by image, or () of all together where the update does not tell them apart.
        """

    @abstractmethod
    def introduction(self) -> str:
        """What the attack is going to do, in plain words."""

    @cached_property
    def ranks(self) -> Ranks:
        """The processes that share this attack."""
        return Ranks(self.trainer)

    def back_propagate(self, loss: Tensor, leaf: Tensor) -> None:
        """Add the gradient of this process's part of a loss to that of a leaf: a parameter, or a part's copy.

        DDP is kept from exchanging gradients: it would take means, and once for every call.
        """
        strategy = self.trainer.strategy
        with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
            self.manual_backward(loss, inputs=[leaf])  # and not to a simulation's first weights

    def join_gradients(self, parameter: nn.Parameter) -> None:
        """Give every process the sum of all processes' gradients."""
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = self.ranks.reduce(own)

    @property
    def observations(self) -> list[Observation]:
        """The observed rounds, oldest first."""
        return self.trainer.datamodule.observations

    def the_observation(self) -> Observation:
        """The one observed round.

        Raises:
            AttackError: there are several.
        """
        if len(self.observations) != 1:
            raise AttackError(
                f"{type(self).__name__} inverts one round, but {len(self.observations)} were observed. "
                "Name one in `federation.observed_rounds`."
            )
        return self.observations[0]

    def observed_update(self) -> Tensors:
        """What the attack inverts: the update of the peers alone, or with the attacker's own left in."""
        return self.update_of(self.the_observation())

    def update_of(self, observation: Observation) -> Tensors:
        """One round's update of the peers alone, or with the attacker's own left in."""
        return observation.peers_update() if self.subtract_own else observation.aggregated_update()

    def configure_callbacks(self) -> list[Callback]:
        return [
            ModelCheckpoint(
                filename="{step}",
                every_n_train_steps=self._steps_between_checkpoints,
                save_last=True,
                auto_insert_metric_name=False,
            )
        ]

    @property
    def _steps_between_checkpoints(self) -> int:
        """At most all steps, so that there is a checkpoint whose place the last step can take."""
        return min(self.checkpoint_every, max(self.trainer.max_steps, 1))

    def on_train_batch_end(self, outputs: object, batch: int, batch_idx: int) -> None:
        """Keep the last step too, where it is no multiple of `checkpoint_every`."""
        kept = self.trainer.checkpoint_callback  # None where nothing is to be kept
        if kept and self.global_step == self.trainer.max_steps and self.global_step % self._steps_between_checkpoints:
            self.trainer.save_checkpoint(kept.last_model_path)

    @torch.no_grad()
    def validation_step(self, batch: int, batch_idx: int) -> Reconstruction:
        return self.reconstruction()

    test_step = predict_step = validation_step

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["observed"] = self._observed()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if checkpoint.get("observed") != self._observed():
            raise AttackError(
                "This checkpoint does not belong to this attack on this Observation: it was made by "
                f"{checkpoint.get('observed', 'another program')}, but here is {self._observed()}. "
                "Name its own configuration, or start without `--ckpt_path`."
            )

    def _observed(self) -> dict[str, str | list]:
        """A few numbers of the observed models, enough to tell one Observation from another."""
        probe = [
            [observation.round, *(float(tensor.flatten()[0]) for tensor in observation.after.values())]
            for observation in self.observations
        ]
        return {"attack": type(self).__name__, "rounds": probe}
