"""The contract of all attacks: observed rounds in, a reconstruction out."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from attack_modules.simulation.distributed import Ranks
from attack_modules.threat_model.observed import ObservedRound, RoundsSummary
from attack_modules.threat_model.requirements import Requirement, check
from fl_lightning.client import Tensors
from fl_lightning.errors import AuditError


class Reconstruction(NamedTuple):
    """The result of an attack: N images in arbitrary order."""

    images: Tensor
    """(N, C, H, W) float in [0, 1]."""
    labels: Tensor
    """(N,) long, told or inferred."""
    latent_downscale: int = 1
    """The images were reconstructed this much smaller and upsampled (bicubic); 1 if at full resolution."""
    num_classes: int | None = None
    """Number of classes of the attacked model, None if unknown."""
    consistency_error: Callable[[Tensor, Tensor], Tensor] | None = None
    """Candidate images (n, C, H, W), and (n,) which reconstructions they would replace -> (n,) data-consistency error
    of each, lower is better. None if the attack cannot evaluate it image by image."""
    peers: Tensor | None = None
    """(N,) long: images with the same number are attributed to the same peer; None if the attack cannot tell."""
    indices: Tensor | None = None
    """(N,) long, the index that seeds an image's random numbers; None for 0 to N - 1."""

    def part(self, indices: Tensor) -> "Reconstruction":
        """A subset (n,) of the images, which keep their labels, peers and random numbers."""
        error = self.consistency_error
        return self._replace(
            images=self.images[indices],
            labels=self.labels[indices],
            peers=None if self.peers is None else self.peers[indices],
            consistency_error=error and (lambda images, i: error(images, indices.to(i.device)[i])),
            indices=indices if self.indices is None else self.indices[indices],
        )


class AttackError(AuditError):
    """The observed rounds cannot be read, or a checkpoint belongs to another attack."""


class Attack(LightningModule, ABC):
    """An attack on the peers of an honest-but-curious client. Its data module is `ObservedRounds`.

    A subclass declares its `requirements`, creates its parameters in `configure_model`, and implements
    `reconstruction`, `misfit` and `introduction`.

    Args:
        subtract_own: subtract the attacker's own update from the aggregate first.
        checkpoint_every: steps between checkpoints, from which `--ckpt_path` resumes.
    """

    def __init__(self, subtract_own: bool = True, checkpoint_every: int = 10) -> None:
        super().__init__()
        self.subtract_own = subtract_own
        self.checkpoint_every = checkpoint_every

    @abstractmethod
    def requirements(self, processes: int) -> list[Requirement]:
        """What the observed rounds must be like for this attack to run in so many processes."""

    @abstractmethod
    def reconstruction(self) -> Reconstruction:
        """The best images so far, chosen by the attack's own loss, with their labels."""

    @abstractmethod
    def misfit(self, images: Tensor, labels: Tensor) -> Tensor:
        """Relative distance between what images would have contributed to the update and what was observed.

        It is 0 for images that explain the observation exactly, and needs no original. An enhancement that invents
        detail raises it.

        Args:
            images: (N, C, H, W) in [0, 1], in the order of `reconstruction`.
            labels: (N,) long.

        Returns:
            (N,) for each image, or () for all together where the update does not separate them.
        """

    @abstractmethod
    def introduction(self) -> str:
        """What the attack found so far and what it is going to do, in a few lines."""

    def diagnosis(self) -> dict[str, Any]:
        """What the attack can say of its own result without ground truth, in JSON types; goes into `results.json`."""
        return {}

    @property
    def title(self) -> str:
        """The attack's name in results and checkpoints."""
        return type(self).__name__

    def check(self, rounds: RoundsSummary, processes: int = 1) -> None:
        """Refuse rounds that this attack cannot run on.

        Raises:
            RequirementError: a requirement is not met.
        """
        check(self.requirements(processes), rounds, type(self).__name__)

    def setup(self, stage: str) -> None:
        self.check(self.trainer.datamodule.summary(), self.trainer.world_size)

    @cached_property
    def ranks(self) -> Ranks:
        """The processes that share this attack."""
        return Ranks(self.trainer)

    def back_propagate(self, loss: Tensor, leaf: Tensor) -> None:
        """Add the gradient of this process's part of the loss to `leaf.grad`.

        DDP's own gradient exchange is blocked: it would average, and after every call.
        """
        strategy = self.trainer.strategy
        with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
            self.manual_backward(loss, inputs=[leaf])  # no gradients for the weights of a simulation

    def join_gradients(self, parameter: nn.Parameter) -> None:
        """Replace a parameter's gradient by the sum over all processes."""
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = self.ranks.reduce(own)

    @property
    def observed_rounds(self) -> list[ObservedRound]:
        """The observed rounds, oldest first."""
        return self.trainer.datamodule.rounds

    def update_of(self, observed: ObservedRound) -> Tensors:
        """The update that is attacked: the peers' alone, or the aggregate including the attacker's own."""
        return observed.peers_update() if self.subtract_own else observed.aggregated_update()

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
        """At most all steps, so that a run shorter than `checkpoint_every` leaves a checkpoint too."""
        return min(self.checkpoint_every, max(self.trainer.max_steps, 1))

    def on_train_batch_end(self, outputs: object, batch: int, batch_idx: int) -> None:
        """Save the last step too where it is no multiple of `checkpoint_every`."""
        kept = self.trainer.checkpoint_callback  # None where nothing is to be kept
        if kept and self.global_step == self.trainer.max_steps and self.global_step % self._steps_between_checkpoints:
            self.trainer.save_checkpoint(kept.last_model_path)

    @torch.no_grad()
    def validation_step(self, batch: int, batch_idx: int) -> Reconstruction:
        return self.reconstruction()

    test_step = predict_step = validation_step

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["observed"] = self._fingerprint()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if checkpoint.get("observed") != self._fingerprint():
            raise AttackError(
                "This checkpoint does not belong to this attack on this Observation: it was made by "
                f"{checkpoint.get('observed', 'another program')}, but here is {self._fingerprint()}. "
                "Name its own configuration, or start without `--ckpt_path`."
            )

    def _fingerprint(self) -> dict[str, str | list]:
        """The attack's name and one number of each observed tensor, which tell Observations apart."""
        probe = [
            [seen.observation.round, *(float(tensor.flatten()[0]) for tensor in seen.observation.after.values())]
            for seen in self.observed_rounds
        ]
        return {"attack": self.title, "rounds": probe}
