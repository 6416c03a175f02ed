"""Gradient matching: the paper's attack (arXiv 2410.04661, section 4)."""

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from attack_modules.analytic.label_inference import infer_labels
from attack_modules.attack import Attack, AttackError, Reconstruction
from attack_modules.gradient_matching.latent_detail import Detail, public_photographs
from attack_modules.gradient_matching.objectives import Objective, SquaredL2
from attack_modules.gradient_matching.upsampling import upsampled
from attack_modules.priors import Prior, annealed
from attack_modules.simulation.feature_map import for_speed
from attack_modules.simulation.half_way import model_half_way
from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.simulation.low_rank import SimulatedUpdate
from fl_lightning.data import Photographs
from fl_lightning.errors import SettingError
from fl_lightning.models import FIRST_LAYER, ImageClassifier
from fl_lightning.observation import Observation

RESOLUTION = 1e-6
"""Of a relative loss in float32: two losses below it do not differ."""


class GradientInversion(Attack):
    """Images whose simulated training gives the peers' update; its parameters ARE the images.

    Each step simulates the peers' local training on the current images, compares the resulting update with the
    observed one, and moves the images by Adam. `trainer.max_steps` is the number of steps.

    Args:
        lr: the attacker's own learning rate, of Adam on the images, with cosine decay to a tenth.
        latent_downscale: images are a latent of 1/latent_downscale of the size, upsampled bicubically; 1 for pixels.
        objective: distance between simulated and observed update; null for SquaredL2.
        priors: penalties that are added to the objective.
        anneal: factor on the priors' weights at the first and at the last step, geometric between.
        betas: of Adam. The second is short, because the gradient falls by orders of magnitude within a hundred steps.
        merged: simulate one virtual client with all images (the paper's way), or client by client.
        simulate: `all` trains the whole model in the simulation; `head` the head alone, with the convolutions held half
            way between the two observed models, which takes a small part of the time. The convolutions' update is then
            not compared.
        detail: count what the latent leaves out of an image as noise, whose mean and covariance in the features are
            those of public photographs, and compare the first linear layer's update where it is white (`Detail`).
        chunk_size: images whose activations are kept in memory at once; those of all images are computed once more,
            for more images than memory has room for. null for all.
        subtract_own: take the attacker's own update out of the aggregate first.
        restarts: independent starts that run side by side; the one with the least loss is the result.
        divergence_factor: a start whose loss exceeds its best by this factor returns to its best at half the rate.
        checkpoint_every: steps between checkpoints.
        seed: of the starts.
    """

    def __init__(
        self,
        lr: float = 0.1,
        latent_downscale: int = 4,
        objective: Objective | None = None,
        priors: list[Prior] | None = None,
        anneal: tuple[float, float] = (1.0, 1.0),
        betas: tuple[float, float] = (0.8, 0.99),
        merged: bool = True,
        simulate: Literal["all", "head"] = "all",
        detail: bool = False,
        chunk_size: int | None = None,
        subtract_own: bool = True,
        restarts: int = 1,
        divergence_factor: float = 10.0,
        checkpoint_every: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(subtract_own, checkpoint_every)
        least = min(latent_downscale, restarts, 1 if chunk_size is None else chunk_size)
        if min(lr, *anneal) <= 0 or least < 1 or divergence_factor <= 1:
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
        self.merged = merged
        self.simulate = simulate
        self.detail = detail
        self.chunk_size = chunk_size
        self.restarts = restarts
        self.divergence_factor = divergence_factor
        self.seed = seed

    def configure_model(self) -> None:
        if hasattr(self, "starts"):
            return
        observation = self.the_observation()
        device = self.trainer.strategy.root_device
        update = self.observed_update()
        self.observed = {name: tensor.to(device, torch.get_default_dtype()) for name, tensor in update.items()}
        self.whole = self.peers = self._simulated()  # in the precision that is set now, and not at the end of the run
        self.noise: Detail | None = None
        if self.simulate == "head" or self.detail:
            half_way = model_half_way([observation], [update], observation.beliefs.local_steps)
            half_way = for_speed(half_way, device)
            self.noise = self._detail(half_way, observation) if self.detail else None
            self.peers = self._simulated(half_way if self.simulate == "head" else None, self.noise and self.noise.mean)
        self.target = self._compared({name: self.observed[name] for name in self.peers.parameters})
        self.objective.weights(list(self.target))  # refuse unknown layers now
        labels = observation.beliefs.labels
        self.register_buffer("labels", torch.tensor(labels) if labels else infer_labels(observation, update))
        self.starts = nn.ParameterList(self._start(trial, observation.image_shape) for trial in range(self.restarts))
        for trial, start in enumerate(self.starts):
            self.register_buffer(f"best_{trial}", start.detach().clone())
        self.register_buffer("best_loss", torch.full((self.restarts,), torch.inf))

    def _detail(self, model: ImageClassifier, observation: Observation) -> Detail:
        if isinstance(getattr(self.trainer.datamodule, "data", None), Photographs):
            raise AttackError(
                "`model.detail` takes what it knows of photographs from those of scikit-image and scikit-learn, but "
                "here they are the victims' own. Attack other images, or set `model.detail: false`."
            )
        photographs = public_photographs(observation.image_shape).to(self.trainer.strategy.root_device)
        return Detail.of(model, photographs, self.latent_downscale, self.observed[FIRST_LAYER])

    def _simulated(self, held: ImageClassifier | None = None, shift: Tensor | None = None) -> SimulatedPeers:
        device = self.trainer.strategy.root_device
        return SimulatedPeers(self.the_observation(), self.merged, device, self.ranks, self.chunk_size, held, shift)

    def _compared(self, update: SimulatedUpdate) -> SimulatedUpdate:
        """An update in the metric in which two of them are compared."""
        return self.noise.whitened(update) if self.noise else update

    def _start(self, trial: int, image_shape: tuple[int, int, int]) -> nn.Parameter:
        channels, height, width = image_shape
        if height % self.latent_downscale or width % self.latent_downscale:
            raise AttackError(
                f"`model.latent_downscale` is {self.latent_downscale}, which does not divide the image size "
                f"{height}x{width}. Use a divisor, or 1."
            )
        generator = torch.Generator().manual_seed(self.seed * 1000 + trial)
        shape = (len(self.labels), channels, height // self.latent_downscale, width // self.latent_downscale)
        return nn.Parameter(0.5 + 0.05 * torch.randn(shape, generator=generator))

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        optimizer = torch.optim.Adam([{"params": [start], "lr": self.lr} for start in self.starts], betas=self.betas)
        return [optimizer], [
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(self.trainer.max_steps, 1), self.lr / 10)
        ]

    def loss(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and weighted priors, before annealing, of one start's latent: two numbers, this process's part."""
        images = self.decode(latent).contiguous(memory_format=torch.channels_last)
        simulated = self._compared(self.peers.mean_update(images, self.labels))
        objective = self.objective(simulated, self.target) / self.ranks.count
        own = images[self.ranks.shard(len(images))]
        prior = sum((prior.weight * prior(own).sum() / len(images) for prior in self.priors), objective.new_zeros(()))
        return objective, prior

    @torch.inference_mode(False)
    @torch.enable_grad()  # the simulated training differentiates
    def misfit(self, images: Tensor, labels: Tensor) -> Tensor:
        """() `|simulated - observed| / |observed|` over all layers, whatever the objective weighs."""
        images = images.detach().to(self.device).clone(memory_format=torch.channels_last)
        simulated = self.whole.mean_update(images, labels.to(self.device).clone())
        return SquaredL2()(simulated, self.observed).sqrt().detach()

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
        """A start that diverged goes back to its best iterate, with half the rate and without Adam's memory."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        for trial, (latent, loss) in enumerate(zip(self.starts, losses, strict=True)):
            if loss <= self.divergence_factor * self.best_loss[trial].clamp_min(RESOLUTION):
                continue
            latent.copy_(self.get_buffer(f"best_{trial}"))
            optimizer.state.pop(latent, None)
            group = optimizer.param_groups[trial]
            group["lr"] /= 2
            rank_zero_warn(
                f"Start {trial} diverged at step {self.global_step} (loss {loss:.3g}, best "
                f"{self.best_loss[trial]:.3g}): it returns to its best images with the rate {group['lr']:.3g}."
            )

    def reconstruction(self) -> Reconstruction:
        best = self.get_buffer(f"best_{int(self.best_loss.argmin())}")
        images, num_classes = self.decode(best).float().clamp(0, 1), self.observations[0].num_classes
        return Reconstruction(images, self.labels, self.latent_downscale, num_classes)

    def introduction(self) -> str:
        count, shape = len(self.labels), tuple(self.starts[0].shape[1:])
        unknown, known = self.starts[0].numel(), sum(tensor.numel() for tensor in self.target.values())
        detail = "What a latent leaves out counts as noise, like that of public photographs.\n" if self.detail else ""
        clients = "one merged client" if self.peers.client_sizes is None else f"{len(self.peers.client_sizes)} clients"
        rate = f"learning rate {self.peers.beliefs.client_lr:g}, {self.peers.beliefs.local_epochs} local epochs"
        return (
            f"Attack: gradient matching. {count} images with labels {self.the_observation().sources['labels']}, as "
            f"latents of shape {shape}: {unknown:,} unknown numbers against {known:,} of the update.\n"
            f"It simulates {clients} ({rate}) and minimises {type(self.objective).__name__}"
            + "".join(f" + {prior.weight:g} {type(prior).__name__}" for prior in self.priors)
            + f" by Adam at rate {self.lr:g} for {self.trainer.max_steps} steps, {self.restarts} start(s).\n"
            f"{detail}{self.peers.introduction()}"
        )
