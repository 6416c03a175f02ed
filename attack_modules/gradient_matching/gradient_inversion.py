"""Gradient matching: the attack of arXiv 2410.04661, section 4."""

import math
import statistics
from collections import Counter
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from attack_modules.analytic.observed_head import labels_in
from attack_modules.analytic.suspicion import qualified, suspected_defenses
from attack_modules.attack import Attack, Reconstruction, Verdict
from attack_modules.gradient_matching.latent_detail import Detail, public_photographs
from attack_modules.gradient_matching.objectives import Objective, SquaredL2
from attack_modules.gradient_matching.upsampling import upsampled
from attack_modules.gradient_matching.verdict import judge
from attack_modules.priors import Prior, annealed
from attack_modules.simulation.feature_map import for_speed
from attack_modules.simulation.half_way import model_half_way
from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.simulation.low_rank import SimulatedUpdate
from attack_modules.simulation.memory import simulation_bytes
from attack_modules.threat_model.observed import ObservedRound, RoundsSummary
from attack_modules.threat_model.requirements import (
    ImageSize,
    LabelsOrLinearHead,
    LinearHead,
    OtherImages,
    Requirement,
    SingleRound,
    TwiceDifferentiable,
)
from fl_lightning.errors import SettingError, counted, positive
from fl_lightning.models import ImageClassifier

FINAL_RATE = 0.1
"""Share of the learning rate that is left at the last step."""
RESOLUTION = 1e-6
"""Of a relative loss in float32: smaller differences mean nothing."""


class GradientInversion(Attack):
    """Images whose simulated training gives the peers' update; its parameters ARE the images.

    Each step simulates the peers' local training on the current images, compares the resulting update with the observed
    one, and moves the images by Adam. `trainer.max_steps` is the number of steps.

    Args:
        lr: learning rate of Adam on the images, with cosine decay to a tenth.
        latent_downscale: the images are a latent this much smaller in height and width, upsampled bicubically; 1 for
            pixels.
        objective: distance between simulated and observed update; null for `SquaredL2`.
        priors: penalties that are added to the objective.
        anneal: factor on the priors' weights at the first and at the last step, geometric between.
        betas: of Adam. The second is small, because the gradient falls by orders of magnitude within a hundred steps.
        signed: give Adam the signs of the gradient alone (Geiping et al. 2020).
        merged: simulate one virtual client with all images (as in the paper), or client by client.
        simulate: `all` trains the whole model in the simulation. `head` trains the head alone, with the convolutions
            frozen half way between the two observed models, at a fraction of the time; the convolutions' update is then
            not compared.
        detail: model the image detail that no latent can represent as noise of the features, with mean and covariance
            from public photographs, and compare the first linear layer's update whitened by it (`Detail`).
        chunk_size: images whose activations are kept in memory at once, those of the others are recomputed; null for
            all.
        subtract_own: subtract the attacker's own update from the aggregate first.
        restarts: independent starts, optimised side by side; the one with the least loss is the result.
        divergence_factor: a start whose loss exceeds its best by this factor returns to its best at half the rate.
        checkpoint_every: steps between checkpoints.
        seed: of the starts; null for that of `seed_everything`.
    """

    def __init__(
        self,
        lr: float = 0.1,
        latent_downscale: int = 4,
        objective: Objective | None = None,
        priors: list[Prior] | None = None,
        anneal: tuple[float, float] = (1.0, 1.0),
        betas: tuple[float, float] = (0.8, 0.99),
        signed: bool = False,
        merged: bool = True,
        simulate: Literal["all", "head"] = "all",
        detail: bool = False,
        chunk_size: int | None = None,
        subtract_own: bool = True,
        restarts: int = 1,
        divergence_factor: float = 10.0,
        checkpoint_every: int = 10,
        seed: int | None = None,
    ) -> None:
        super().__init__(subtract_own, checkpoint_every)
        least = min(latent_downscale, restarts, 1 if chunk_size is None else chunk_size)
        if not positive(lr, *anneal) or least < 1 or not (positive(divergence_factor) and divergence_factor > 1):
            raise SettingError(
                "`model` needs lr > 0, anneal > 0, latent_downscale >= 1, restarts >= 1, divergence_factor > 1, and "
                f"chunk_size >= 1 or null, but got lr={lr}, anneal={anneal}, latent_downscale={latent_downscale}, "
                f"restarts={restarts}, divergence_factor={divergence_factor}, chunk_size={chunk_size}."
            )
        if detail and latent_downscale == 1:
            raise SettingError(
                "`model.detail` is what a latent leaves out of an image, but `model.latent_downscale` is 1, which "
                "leaves out nothing. Give a larger one, or set `model.detail: false`."
            )
        self.automatic_optimization = False  # one backward pass a start, so that memory holds one graph
        self.lr = lr
        self.latent_downscale = latent_downscale
        self.objective = objective or SquaredL2()
        self.priors = priors or []
        self.anneal = anneal
        self.betas = betas
        self.signed = signed
        self.merged = merged
        self.simulate = simulate
        self.detail = detail
        self.chunk_size = chunk_size
        self.restarts = restarts
        self.divergence_factor = divergence_factor
        self.seed = seed or 0

    def requirements(self, processes: int) -> list[Requirement]:
        latent = ImageSize(self.latent_downscale, rgb=False, reason="`model.latent_downscale` (1 always fits)")
        simulated = SimulatedPeers.requirements(self.merged, self.chunk_size, processes)
        detail = [LinearHead(), OtherImages("Photographs")] if self.detail else []
        whole = [TwiceDifferentiable()] if self.simulate == "all" else []
        return [SingleRound(), latent, *simulated, *whole, LabelsOrLinearHead(), *detail]

    def least_memory(self, rounds: RoundsSummary) -> int:
        simulated = simulation_bytes(
            rounds.model,
            rounds.image_shape,
            rounds.assumptions[0],
            self.merged,
            self.chunk_size,
            head_alone=self.simulate == "head",
        )
        return super().least_memory(rounds) + simulated

    def setup(self, stage: str) -> None:
        if self.trainer.precision == "16-mixed":
            raise SettingError(
                "Gradient matching finds nothing in `trainer.precision: 16-mixed`, whose range is too small for second "
                "derivatives (20 steps on a GPU: 13 dB, in the others 20). Choose bf16-mixed or 32-true."
            )
        super().setup(stage)

    def prepare(self) -> None:
        (seen,) = self.observed_rounds
        device = self.trainer.strategy.root_device
        update = self.update_of(seen)
        self.observed = {name: tensor.to(device, torch.get_default_dtype()) for name, tensor in update.items()}
        self.whole = self.peers = self._simulated(seen)  # its dtype is the default of now, not of the end of the run
        self.noise: Detail | None = None
        if self.simulate == "head" or self.detail:
            half_way = model_half_way([seen.observation], [update], seen.assumptions.local_steps)
            half_way = for_speed(half_way, device)
            if self.detail:
                photographs = public_photographs(seen.observation.image_shape).to(device)
                self.noise = Detail.of(half_way, photographs, self.latent_downscale, self.observed)
            frozen = half_way if self.simulate == "head" else None
            self.peers = self._simulated(seen, frozen, self.noise and self.noise.mean)
        self.target = self._compared({name: self.observed[name] for name in self.peers.parameters})
        self.objective.weights(list(self.target))  # refuse unknown layers now
        self.register_buffer("labels", labels_in(seen, update, seen.observation.build_model(shared=True)))
        self.starts = nn.ParameterList(
            self._start(trial, seen.observation.image_shape) for trial in range(self.restarts)
        )
        for trial, start in enumerate(self.starts):
            self.register_buffer(f"best_{trial}", start.detach().clone())
        self.register_buffer("best_loss", torch.full((self.restarts,), torch.inf))

    def _simulated(
        self, seen: ObservedRound, frozen: ImageClassifier | None = None, offset: Tensor | None = None
    ) -> SimulatedPeers:
        device = self.trainer.strategy.root_device
        return SimulatedPeers(seen, self.merged, device, self.ranks, self.chunk_size, frozen, offset)

    def _compared(self, update: SimulatedUpdate) -> SimulatedUpdate:
        """An update in the metric in which updates are compared."""
        return self.noise.whitened(update) if self.noise else update

    def _start(self, trial: int, image_shape: tuple[int, int, int]) -> nn.Parameter:
        channels, height, width = image_shape
        generator = torch.Generator().manual_seed(self.seed * 1000 + trial)
        shape = (len(self.labels), channels, height // self.latent_downscale, width // self.latent_downscale)
        return nn.Parameter(0.5 + 0.05 * torch.randn(shape, generator=generator))

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        optimizer = torch.optim.Adam([{"params": [start], "lr": self.lr} for start in self.starts], betas=self.betas)
        steps = max(self.trainer.max_steps, 1)  # CosineAnnealingLR would take them from the checkpoint it goes on from
        cosine = [lambda step: FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * step / steps)) / 2]
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, cosine * len(self.starts))]

    def loss(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of two scalars of one start's latent: objective, and weighted priors before annealing."""
        images = self.decode(latent).contiguous(memory_format=torch.channels_last)
        simulated = self._compared(self.peers.mean_update(images, self.labels))
        objective = self.objective(simulated, self.target) / self.ranks.count
        own = images[self.ranks.shard(len(images))]
        prior = sum((prior.weight * prior(own).sum() / len(images) for prior in self.priors), objective.new_zeros(()))
        return objective, prior

    def misfit(self, images: Tensor, labels: Tensor) -> Tensor:
        """() `|simulated - observed| / |observed|` over all layers, whatever the objective weighs."""
        simulated = self._explained(images, labels)
        return SquaredL2()(simulated, {name: self.observed[name] for name in simulated}).sqrt().detach()

    @torch.inference_mode(False)
    @torch.enable_grad()  # the simulation needs gradients
    def _explained(self, images: Tensor, labels: Tensor) -> SimulatedUpdate:
        """The update that images (N, C, H, W) with labels (N,) would have given, of the whole model."""
        images = images.detach().to(self.device).clone(memory_format=torch.channels_last)
        return self.whole.mean_update(images, labels.to(self.device).clone())

    def decode(self, latent: Tensor) -> Tensor:
        """(N, C, h, w) latent -> (N, C, h * latent_downscale, w * latent_downscale) images."""
        return upsampled(latent, self.latent_downscale)

    def training_step(self, batch: int, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        factor = annealed(self.anneal, self.global_step, self.trainer.max_steps)
        losses = []
        for trial, latent in enumerate(self.starts):
            objective, prior = self.loss(latent)
            self.back_propagate(objective + factor * prior, latent)
            self.join_gradients(latent)
            if self.signed:
                latent.grad.sign_()
            losses.append(self.ranks.reduce((objective + self.anneal[1] * prior).detach()))
            self._remember(trial, latent, losses[-1])
        optimizer.step()
        scheduler.step()
        self._guard(losses)
        with torch.no_grad():
            for latent in self.starts:
                latent.clamp_(0, 1)
        self.log("loss", torch.stack(losses).min(), prog_bar=True)
        self.log("best_loss", self.best_loss.min(), prog_bar=True)

    def _remember(self, trial: int, latent: Tensor, loss: Tensor) -> None:
        if loss < self.best_loss[trial]:
            self.best_loss[trial] = loss
            self.get_buffer(f"best_{trial}").copy_(latent.detach())

    @torch.no_grad()
    def _guard(self, losses: list[Tensor]) -> None:
        """Reset a diverged start to its best iterate, with half the rate and without Adam's moments."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        for trial, (latent, loss) in enumerate(zip(self.starts, losses, strict=True)):
            if loss <= self.divergence_factor * self.best_loss[trial].clamp_min(RESOLUTION):
                continue
            latent.copy_(self.get_buffer(f"best_{trial}"))
            optimizer.state.pop(latent, None)
            group = optimizer.param_groups[trial]
            group["lr"] /= 2
            self.lr_schedulers().base_lrs[trial] /= 2  # of which the schedule takes its shares
            rank_zero_warn(
                f"Start {trial} diverged at step {self.global_step} (loss {loss:.3g}, best "
                f"{self.best_loss[trial]:.3g}): it is reset to its best images, with the rate {group['lr']:.3g}."
            )

    def reconstruction(self) -> Reconstruction:
        best = self.get_buffer(f"best_{int(self.best_loss.argmin())}")
        return Reconstruction(
            self.decode(best).float().clamp(0, 1),
            self.labels,
            self.latent_downscale,
            latent=best.float().clone() if self.latent_downscale > 1 else None,
            num_classes=self.observed_rounds[0].observation.num_classes,
        )

    def diagnosis(self) -> dict[str, Any]:
        counts = Counter(self.labels.tolist())
        return {
            "num_images": len(self.labels),
            "images_by_class": dict(sorted(counts.items())),
            "best_loss": self.best_loss.min().item(),
        }

    def verdict(self, misfit: Tensor) -> Verdict:
        seen = self.observed_rounds[0]
        simulated = self._explained(*self.reconstruction()[:2])
        single = [SquaredL2()({name: simulated[name]}, {name: self.observed[name]}).item() for name in self.target]
        verdict = judge(misfit.item(), len(self.labels), statistics.median(single) ** 0.5)
        suspected = suspected_defenses(self.update_of(seen), seen.observation.before, seen.assumptions)
        return qualified(verdict, suspected, seen.assumptions)

    def introduction(self) -> str:
        count, shape = len(self.labels), tuple(self.starts[0].shape[1:])
        unknown, known = self.starts[0].numel(), sum(tensor.numel() for tensor in self.target.values())
        assumptions, sizes = self.peers.assumptions, self.peers.client_sizes
        clients = "one merged client" if sizes is None else f"{len(sizes)} clients"
        detail = " Detail beyond the latent counts as noise." if self.detail else ""
        return (
            f"Gradient matching: {counted(count, 'image')} with labels {assumptions.sources['labels']}, as latents of "
            f"shape {shape}: {unknown:,} unknowns, {known:,} equations.{detail}\n"
            f"It simulates {clients} (lr {assumptions.client_lr:g}, {assumptions.local_epochs} local epochs) and "
            f"minimises {type(self.objective).__name__}"
            + "".join(f" + {prior.weight:g} {type(prior).__name__}" for prior in self.priors)
            + f" by Adam{' on signs' * self.signed} at rate {self.lr:g}, {self.trainer.max_steps} steps, "
            f"{counted(self.restarts, 'start')}.\n"
            f"{self.peers.introduction()}"
        )
