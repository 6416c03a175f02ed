"""The contract of all attacks: observed rounds in, a reconstruction out."""

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from attack_modules.panels import draw_panel, save_images
from attack_modules.simulation.distributed import Ranks
from attack_modules.threat_model.assumptions import Assumptions
from attack_modules.threat_model.observed import GivenRounds, ObservedRound, RoundsSummary
from attack_modules.threat_model.plausibility import doubts, refuse_impossible
from attack_modules.threat_model.requirements import FittingClassWeights, Requirement, RequirementError, check
from fl_lightning.allocation import has_large, release_freed_memory
from fl_lightning.client import Tensors, quiet, silent_trainer
from fl_lightning.errors import AuditError, SettingError
from fl_lightning.memory import exceeds_memory
from fl_lightning.observation import Observation
from fl_lightning.record import describe, differences, summary
from fl_lightning.server_optimizers import FedAvg
from fl_lightning.storage import atomic_path, load_checkpoint, write_json

OF_NO_EFFECT = ("checkpoint_every", "chunk_size")
"""Settings that change no result, and may differ between a checkpoint and the run that it is loaded into."""


class Reconstruction(NamedTuple):
    """The result of an attack: N images in arbitrary order."""

    images: Tensor
    """(N, C, H, W) float in [0, 1]."""
    labels: Tensor
    """(N,) long, told or inferred."""
    latent_downscale: int = 1
    """The images were reconstructed this much smaller and upsampled (bicubic); 1 if at full resolution."""
    latent: Tensor | None = None
    """(N, C, H / latent_downscale, W / latent_downscale), what the images were upsampled from, not clamped; None if the
    images were reconstructed at full resolution."""
    num_classes: int | None = None
    """Number of classes of the attacked model, None if unknown."""
    consistency_error: Callable[[Tensor, Tensor], Tensor] | None = None
    """Candidate images (n, C, H, W), and (n,) which reconstructions they would replace -> (n,) data-consistency error
    of each, lower is better. None if the attack cannot evaluate it image by image."""
    peers: Tensor | None = None
    """(N,) long: images with the same number are attributed to the same peer; None if the attack cannot tell."""
    indices: Tensor | None = None
    """(N,) long, the index that seeds an image's random numbers; None for 0 to N - 1."""
    features: Tensor | None = None
    """(N, D) that leaked; None where those of the images themselves did not, or depend on other images as well."""
    seen: Tensor | None = None
    """(N, D) bool, which of the features leaked; None for all."""
    embed: Callable[[Tensor], Tensor] | None = None
    """Images (n, C, H, W) -> (n, D) what their features should be; None without `features`."""

    def part(self, indices: Tensor) -> "Reconstruction":
        """A subset (n,) of the images, which keep their labels, peers and random numbers."""
        error = self.consistency_error
        return self._replace(
            images=self.images[indices],
            labels=self.labels[indices],
            latent=None if self.latent is None else self.latent[indices],
            peers=None if self.peers is None else self.peers[indices],
            features=None if self.features is None else self.features[indices],
            seen=None if self.seen is None else self.seen[indices],
            consistency_error=error and (lambda images, i: error(images, indices.to(i.device)[i])),
            indices=indices if self.indices is None else self.indices[indices],
        )


class Level(str, Enum):
    """How far to trust a reconstructed image: whether it shows the peer's image at 20 dB PSNR or better.

    How often it does was measured over runs that work and that fail: notebooks/results.md.
    """

    CERTAIN = "certain"
    LIKELY = "likely"
    UNRELIABLE = "unreliable"
    NOT_READ = "not read"

    def limited(self, most: "Level") -> "Level":
        """This level, but no better than `most`."""
        return max(self, most, key=list(Level).index)


@dataclass(frozen=True)
class Verdict:
    """How far to trust a result, from what an attacker can see: no original is needed.

    Attributes:
        levels: of each reconstructed image.
        missing: images that the update shows but that were not reconstructed.
        reasons: why images are less than certain, each a clause.
        advice: what to try, each a sentence.
        expected_psnr: of each image in dB, where it was measured on control images; None otherwise.
    """

    levels: list[Level]
    missing: int = 0
    reasons: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    expected_psnr: list[float] | None = None

    @property
    def level(self) -> Level:
        """Of the whole: the level that more than half of the images reach, missing ones included."""
        every = sorted([*self.levels, *[Level.NOT_READ] * self.missing], key=list(Level).index)
        return every[len(every) // 2]

    def suspecting(self, clauses: list[str]) -> "Verdict":
        """With further reasons, where images are less than certain."""
        doubtful = self.missing or any(level is not Level.CERTAIN for level in self.levels)
        return replace(self, reasons=[*self.reasons, *clauses]) if doubtful else self

    def sentence(self, originals: int | None = None) -> str:
        """The verdict, its reasons and what to try, in a few lines.

        Args:
            originals: number of images that the peers trained on, where the truth is at hand.
        """
        counts = Counter(self.levels)
        parts = ", ".join(f"{counts[level]} {level.value}" for level in Level if counts[level])
        every = len(self.levels) + self.missing if originals is None else originals
        because = f", because {'; '.join(self.reasons)}" if self.reasons else ""
        lines = [f"Verdict: {self.level.value}. {len(self.levels)} of {every} images found ({parts}){because}."]
        return "\n".join([*lines, *(f"To try: {sentence}" for sentence in self.advice)])

    def results(self) -> dict[str, Any]:
        """What goes into `results.json`."""
        counts = Counter(level.value for level in self.levels)
        return {
            "level": self.level.value,
            "images": {level.value: counts[level.value] for level in Level},
            "missing": self.missing,
            "reasons": self.reasons,
            "advice": self.advice,
        }


@dataclass(frozen=True)
class Result:
    """What an attack found; on the CPU.

    Attributes:
        images: (N, C, H, W) in [0, 1], in arbitrary order.
        labels: (N,) long.
        peers: (N,) long: images with the same number are attributed to the same peer; None if the attack cannot tell.
        misfit: (N,) or (), see `Attack.misfit`.
        verdict: how far to trust each image, and why.
    """

    images: Tensor
    labels: Tensor
    peers: Tensor | None
    misfit: Tensor
    verdict: Verdict

    def save(self, directory: str | Path) -> None:
        """Write `images/NNN.png`, `panel.png` with a caption for each image, and `results.json`.

        Raises:
            StorageError: the disk is full or the folder is not writable.
        """
        directory, levels = Path(directory), self.verdict.levels
        peers = [None] * len(self.labels) if self.peers is None else self.peers.tolist()
        captions = [
            f"class {label}" + ("" if peer is None else f"\npeer {peer}") + f"\n{level.value}"
            for label, peer, level in zip(self.labels.tolist(), peers, levels, strict=True)
        ]
        save_images(self.images, directory / "images")
        with atomic_path(directory / "panel.png") as temporary:
            draw_panel({"reconstruction": self.images}, captions).save(temporary, format="png")
        found = {"labels": self.labels.tolist(), "peers": peers, "levels": [level.value for level in levels]}
        expected = {"expected_psnr": self.verdict.expected_psnr, "misfit": self.misfit.tolist()}
        write_json(directory / "results.json", {"verdict": self.verdict.results(), **found, **expected})


class AttackError(AuditError):
    """The observed rounds cannot be read, or a checkpoint belongs to another attack."""


class Attack(LightningModule, ABC):
    """An attack on the peers of an honest-but-curious client. Its data module is `ObservedRounds`.

    A subclass declares its `requirements`, creates its parameters in `prepare`, and implements `reconstruction`,
    `misfit` and `introduction`.

    A run goes on from a checkpoint as if it had not been interrupted. With a larger `trainer.max_steps` than before,
    what depends on the share of steps done (the learning rate, weights that are annealed, simulations at even
    distances) is from there on as in a run of that length from the beginning; so the learning rate rises again.

    Args:
        subtract_own: subtract the attacker's own update from the aggregate first.
        checkpoint_every: steps between checkpoints, from which `--ckpt_path` resumes, >= 1.

    Raises:
        SettingError: `checkpoint_every` is below 1.
    """

    def __init__(self, subtract_own: bool = True, checkpoint_every: int = 10) -> None:
        super().__init__()
        if checkpoint_every < 1:
            raise SettingError(
                f"`model.checkpoint_every` is {checkpoint_every}, but it must be at least 1. To keep no checkpoints, "
                "set `trainer.enable_checkpointing: false`."
            )
        self.subtract_own = subtract_own
        self.steps_loaded = 0  # of the checkpoint that this run began with
        self.checkpoint_every = checkpoint_every

    @abstractmethod
    def requirements(self, processes: int) -> list[Requirement]:
        """What the observed rounds must be like for this attack to run in so many processes."""

    @abstractmethod
    def prepare(self) -> None:
        """Read the observed rounds, and create the parameters; Lightning then moves those to the device.

        New tensors are on the CPU; what else is to compute on `trainer.strategy.root_device` is moved there explicitly.
        """

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
    def verdict(self, misfit: Tensor) -> Verdict:
        """How far to trust the reconstruction, from what the attacker has.

        Args:
            misfit: of the reconstructed images, see `misfit`.
        """

    @abstractmethod
    def introduction(self) -> str:
        """What the attack found so far and what it is going to do, in a few lines."""

    def diagnosis(self) -> dict[str, Any]:
        """What the attack can say of its own result without ground truth, in JSON types; goes into `results.json`."""
        return {}

    def reconstruct(
        self,
        observation: Observation | Sequence[Observation],
        assumptions: Assumptions,
        steps: int = 150,
        accelerator: str = "cpu",
        earlier: Sequence[Observation] = (),
    ) -> Result:
        """Attack observed rounds here and now, without files; this attack's own state does not change.

        Args:
            observation: one round, or several, oldest first.
            assumptions: how the peers are taken to have trained, in each of the rounds.
            steps: of the optimisation, >= 1.
            accelerator: where Lightning computes (`cpu`, `gpu`, `auto`).
            earlier: rounds before, where the server's optimiser kept something of them.

        Raises:
            AuditError: the rounds do not fit the attack, cannot be rounds of training, or cannot be read.
        """
        if steps < 1:
            raise SettingError(f"`steps` is {steps}, so nothing would be done. Give at least 1.")
        observations = [observation] if isinstance(observation, Observation) else list(observation)
        attack = copy.deepcopy(self)
        with quiet():
            trainer = silent_trainer(max_steps=steps, accelerator=accelerator)
            trainer.callbacks.append(ending := _Ending())
            rounds = [ObservedRound(seen, assumptions, [*earlier, *observations]) for seen in observations]
            trainer.fit(attack, datamodule=GivenRounds(rounds))
        return ending.result

    def result(self) -> Result:
        """What was found; to be called before the trainer moves the parameters away from the device."""
        found = self.reconstruction()
        images, labels = found.images.detach(), found.labels
        misfit = self.misfit(images, labels).cpu()
        peers = None if found.peers is None else found.peers.cpu()
        return Result(images.cpu().contiguous(), labels.cpu(), peers, misfit, self.verdict(misfit))

    @property
    def title(self) -> str:
        """The attack's name in results and checkpoints."""
        return type(self).__name__

    def least_memory(self, rounds: RoundsSummary) -> int:
        """Bytes that the attack certainly holds at once, beside the observed rounds; of all processes together."""
        return sum(parameter.nbytes for parameter in rounds.model.parameters())  # the peers' update

    def peak_memory(self, rounds: RoundsSummary, images: int) -> int | None:
        """Bytes that the attack takes at most beside the program, as a forecast from shapes; None where there is none.

        Args:
            rounds: the observed rounds, or those that are to be simulated.
            images: of all clients.
        """
        return None

    def seconds_of_verdict(self) -> float:
        """How long the verdict takes, which comes after the steps, as a forecast."""
        return 0.0

    def check(self, rounds: RoundsSummary, processes: int = 1, device: str = "cpu") -> None:
        """Refuse rounds that this attack cannot run on.

        Args:
            rounds: the observed rounds, or those that are to be simulated.
            processes: number of processes that run the attack.
            device: type of the device that computes; only a CPU's memory is checked.

        Raises:
            RequirementError: a requirement is not met, or the attack needs more memory than there is.
        """
        name = type(self).__name__
        check([FittingClassWeights(), *self.requirements(processes)], rounds, name)
        if device == "cpu" and (excess := exceeds_memory(self.least_memory(rounds) // processes)):
            raise RequirementError(
                f"{name} takes at least {excess}. Lower `data.image_size` or the number of images, choose a smaller "
                "`federation.model`, or, with GradientInversion, set `model.chunk_size`."
            )

    def setup(self, stage: str) -> None:
        device = self.trainer.strategy.root_device.type
        self.check(self.trainer.datamodule.summary(), self.trainer.world_size, device)
        for seen in self.observed_rounds:
            plain = isinstance(seen.assumptions.server, FedAvg)
            refuse_impossible(seen.observation, seen.assumptions.server_lr if plain else None)
            for doubt in doubts(seen):
                rank_zero_warn(doubt)
        path = Path(self.trainer.ckpt_path or "")
        if path.is_file():  # before the closed form is computed; an address is checked when Lightning has loaded it
            self._refuse_checkpoint(load_checkpoint(path), path)

    def configure_model(self) -> None:
        if not hasattr(self, "_prepared"):  # Lightning calls this anew for each use of the attack
            with torch.device("cpu"):  # else every new tensor would lie on the device, beside the rounds' on the CPU
                self.prepare()
            self._prepared = True
            release_freed_memory()  # what reading took, beside which the rounds are looked at once more in the end

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
        if has_large(observed.observation.before.values()):
            release_freed_memory()  # three models are read for it
        return observed.peers_update() if self.subtract_own else observed.aggregated_update()

    def configure_callbacks(self) -> list[Callback]:
        if not self.trainer.checkpoint_callbacks:  # `trainer.enable_checkpointing: false`
            return []
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
        """Save the step at which the run ends or is stopped, too, where it is no multiple of `checkpoint_every`."""
        kept = self.trainer.checkpoint_callback  # None where nothing is to be kept
        ends = self.trainer.should_stop or self.global_step == self.trainer.max_steps
        if kept and ends and self.global_step % self._steps_between_checkpoints:
            self.trainer.save_checkpoint(kept.last_model_path or Path(kept.dirpath) / "last.ckpt", weights_only=False)
            kept.save_last = False  # it would save once more after the last epoch, where no step could follow

    @torch.no_grad()
    def validation_step(self, batch: int, batch_idx: int) -> Reconstruction:
        return self.reconstruction()

    test_step = predict_step = validation_step

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["observed"] = self._fingerprint()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self._refuse_checkpoint(checkpoint, self.trainer.ckpt_path)
        self.steps_loaded = checkpoint.get("global_step", 0)
        if loops := checkpoint.get("loops"):  # the last step of a run is not that of a longer one
            loops["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False

    @property
    def steps_taken(self) -> int:
        """Steps behind the images; of `test`, which takes none, those of the checkpoint that was loaded."""
        return max(self.global_step, self.steps_loaded)

    def _refuse_checkpoint(self, checkpoint: dict, path: str | Path | None) -> None:
        """Refuse a checkpoint of another run, or one after which nothing is left to do.

        Raises:
            AttackError: the attack, its settings, its knowledge or the observed rounds differ, or all steps are done.
        """
        made = checkpoint.get("observed")
        if made is None:
            raise AttackError(
                f"'{path}' is no checkpoint of an attack, but of another model or program. Name the last.ckpt of an "
                "attack's run folder, or start without `--ckpt_path`."
            )
        here = self._fingerprint()
        differing = differences({**made, "rounds": None}, {**here, "rounds": None})
        if made["rounds"] != here["rounds"]:
            before, now = ([numbers[0] for numbers in found["rounds"]] for found in (made, here))
            same = "the observed models are others, as of another federation, seed or data"
            differing.append(same if before == now else f"observed rounds were {before} and are now {now}")
        if differing:
            raise AttackError(
                f"This checkpoint does not belong to this attack on this Observation: {summary(differing)}. Use the "
                "config.yaml of its own run folder, or start without `--ckpt_path`."
            )
        steps, wanted = checkpoint.get("global_step", 0), self.trainer.max_steps
        if self.trainer.training and 0 < wanted <= steps:
            raise AttackError(
                f"The attack of '{path}' is finished: all its {steps} steps are done, and its results lie in "
                f"'{Path(path).parent.parent}'. To go on from there, raise `--trainer.max_steps` above {steps}."
            )

    def _fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that it is loaded into.

        One number of each observed tensor tells Observations apart.
        """
        probe = [
            [seen.observation.round, *(float(tensor.flatten()[0]) for tensor in seen.observation.after.values())]
            for seen in self.observed_rounds
        ]
        assumed = self.observed_rounds[-1].assumptions
        knowledge = {
            name: describe(getattr(assumed, name)) if source == "guessed" else source
            for name, source in assumed.sources.items()
        }
        settings = {name: value for name, value in describe(self).items() if name not in (*OF_NO_EFFECT, "class")}
        return {"attack": self.title, "rounds": probe, "model": settings, "knowledge": knowledge}


class _Ending(Callback):
    """Takes an attack's result while its parameters are still on the device."""

    result: Result

    def on_train_end(self, trainer: Trainer, pl_module: Attack) -> None:
        self.result = pl_module.result()
