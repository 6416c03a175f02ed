"""Optimisation of a diffusion model's initial noise to match a reconstruction."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.attack import Reconstruction
from attack_modules.diffusion.conditional import ConditionalModel, ddim, explicit_timesteps
from attack_modules.enhance.noise_level import wavelet_noise
from fl_lightning.errors import SettingError
from fl_lightning.models import ImageShape
from fl_lightning.seeds import seed_of


class Step(NamedTuple):
    """Results of one optimisation step, with one entry per sampled image."""

    active: Tensor
    """(n,) long, indices of these images in the search."""
    images: Tensor
    """(n, 3, M, M) samples in [0, 1]."""
    pixel_loss: Tensor
    """(n,) mean squared error to the reconstruction at its resolution, for pixels in [0, 1]."""
    score: Tensor
    """(n,) score for early stopping, lower is better."""


class NoiseSearch(nn.Module):
    """Optimises initial noise so that its sample matches a reconstruction (MDE, arXiv 2410.04661, section IV).

    Every step samples by deterministic DDIM and treats the predicted noise as constant. The sample is then an affine
    function of the initial noise, and its gradient requires backpropagation through the decoder only, not through the
    diffusion network. The gradient is exact for this affine function, but only a search direction for the sampler.

    Before every step the noise is rescaled to norm sqrt(d) in d dimensions, the typical norm of standard normal noise,
    because the model was trained on such noise. An unconstrained norm does not fit the reconstruction better, and gives
    images that look less like their class.

    Only the resolution and channels of the reconstruction are compared: finer detail, and the colours where the
    reconstruction is grey, are unconstrained.

    Early stopping is applied per image, so that no image depends on another. A search keeps the sample with the best
    score, and stops after `patience` steps that together do not improve it by more than a relative `margin`. If the
    attack provides a per-image data-consistency error (`Reconstruction.consistency_error`), that is the score.
    Otherwise the score is the pixel loss, bounded below by the noise variance of the reconstruction (`wavelet_noise`);
    the search stops as soon as it reaches this bound, since a lower loss would only fit the noise.

    Args:
        model: class-conditional diffusion model.
        reconstruction: images (N, C, H, W) with H = W in [0, 1], C 1 or 3, and labels (N,).
        timesteps: number of DDIM steps.
        starts: number of initial noise draws per image, of which the one with the best score is optimised.
        patience: number of steps without improvement of an image, after which its search stops.
        margin: minimum relative improvement of the score that `patience` counts; a smaller one is kept, too.
        seed: seed of the draws; every image has its own generator.

    Raises:
        SettingError: images are not square or neither RGB nor grey, the attacked model has another number of classes
            than the diffusion model, or a label is not among the diffusion model's classes.
    """

    def __init__(
        self,
        model: ConditionalModel,
        reconstruction: Reconstruction,
        timesteps: int = 250,
        starts: int = 1,
        patience: int = 20,
        margin: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        images, labels, latent_downscale = reconstruction.images, reconstruction.labels, reconstruction.latent_downscale
        refuse_unfit(model, images.shape[1:], reconstruction.num_classes)
        _refuse_unknown(model, labels)
        self._model = (model,)  # not a submodule, so that checkpoints exclude it
        self.timesteps = explicit_timesteps(timesteps, len(model.alphas))
        self.patience = patience
        self.margin = margin
        self.consistency_error = reconstruction.consistency_error
        self.shape = images.shape[1:]
        side = max(1, min(images.shape[-1] // latent_downscale, model.image_size))
        self.register_buffer("target", F.adaptive_avg_pool2d(images.float(), side))
        self.register_buffer("labels", labels)
        self.register_buffer("tolerance", wavelet_noise(self.target))
        self.register_buffer("best", images.new_zeros(len(images), 3, model.image_size, model.image_size))
        self.register_buffer("best_score", torch.full((len(images),), torch.inf))
        self.register_buffer("best_step", torch.zeros(len(images), dtype=torch.long))
        self.register_buffer("counted_score", torch.full((len(images),), torch.inf))
        self.register_buffer("counted_step", torch.zeros(len(images), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        numbers = range(len(images)) if reconstruction.indices is None else reconstruction.indices.tolist()
        generators = [torch.Generator().manual_seed(seed_of(seed, number)) for number in numbers]
        draws = [typical(torch.randn(starts, *model.latent_shape, generator=generator)) for generator in generators]
        self.noise = nn.Parameter(self._best_start(torch.stack(draws, dim=1).to(images.device)))

    @property
    def model(self) -> ConditionalModel:
        """The diffusion model, which is not optimised."""
        return self._model[0]

    @property
    def finished(self) -> Tensor:
        """(N,) bool, true for images whose search has stopped."""
        finished = self.steps - self.counted_step > self.patience
        if self.consistency_error is None:
            finished |= (1 - self.margin) * self.best_score <= self.tolerance  # no improvement could exceed the margin
        return finished

    def step(self) -> tuple[Tensor, Step]:
        """Sample once for each image whose search has not stopped, and keep improved samples.

        If all searches have stopped, all images are sampled.

        Returns:
            The loss to minimise, and the results. The loss is the sum of the pixel losses, so that an image's gradient
            does not depend on the other images.
        """
        with torch.no_grad():
            self.noise.copy_(typical(self.noise))
        finished = self.finished
        active = (~finished | finished.all()).nonzero()[:, 0]
        noise, labels = self.noise[active], self.labels[active]
        sample = ddim(self.model, noise.detach(), labels, self.timesteps)
        # An affine function of `noise` whose value is the sample and whose slope is the gain.
        images = self.model.decode(sample.latents + sample.gain * (noise - noise.detach()))
        pixel_loss = self._pixel_loss(images, active)
        images = images.detach().clamp(0, 1)
        found = Step(active, images, pixel_loss.detach(), self._score(images, pixel_loss.detach(), active))
        better = found.score < self.best_score[active]
        self.best[active[better]] = images[better]
        self.best_score[active[better]] = found.score[better]
        self.best_step[active[better]] = self.steps
        counts = found.score < (1 - self.margin) * self.counted_score[active]
        self.counted_score[active[counts]] = found.score[counts]
        self.counted_step[active[counts]] = self.steps
        self.steps += 1
        return pixel_loss.sum(), found

    def seen(self, images: Tensor) -> Tensor:
        """Reduce (N, 3, M, M) images to the resolution and channels of the reconstruction."""
        images = F.adaptive_avg_pool2d(images, self.target.shape[-1])
        return images if self.target.shape[1] == 3 else images.mean(1, keepdim=True)

    def fitted(self, images: Tensor) -> Tensor:
        """Resize (N, 3, M, M) images to (N, C, H, W), the size and channels of the input images."""
        if images.shape[-2:] != self.shape[-2:]:
            images = F.interpolate(images, self.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
        return images if self.shape[0] == 3 else images.mean(1, keepdim=True)

    def _pixel_loss(self, images: Tensor, active: Tensor) -> Tensor:
        return (self.seen(images) - self.target[active]).square().mean((1, 2, 3))

    def _score(self, images: Tensor, pixel_loss: Tensor, active: Tensor) -> Tensor:
        if self.consistency_error is None:
            return torch.maximum(pixel_loss, self.tolerance[active])
        with torch.no_grad():
            return self.consistency_error(self.fitted(images), active).to(pixel_loss)

    @torch.no_grad()
    def _best_start(self, draws: Tensor) -> Tensor:
        """Select the best of (starts, N, *latent_shape) draws for each image: (N, *latent_shape)."""
        if len(draws) == 1:
            return draws[0]
        scores, every = [], torch.arange(draws.shape[1], device=draws.device)
        for noise in draws:
            images = self.model.decode(ddim(self.model, noise, self.labels, self.timesteps).latents)
            pixel_loss = self._pixel_loss(images, every)  # unlike the score, also ranks starts within the noise
            scores.append(self._score(images.clamp(0, 1), pixel_loss, every) if self.consistency_error else pixel_loss)
        return draws[torch.stack(scores).argmin(0), every]


def typical(noise: Tensor) -> Tensor:
    """Rescale (N, ...) noise to the norm at which standard normal noise concentrates, sqrt(d) in d dimensions."""
    lengths = noise.flatten(1).norm(dim=1) / noise[0].numel() ** 0.5
    return noise / lengths.view(-1, *[1] * (noise.ndim - 1))


def refuse_unfit(model: ConditionalModel, image_shape: ImageShape, attacked: int | None) -> None:
    """Raise SettingError for images (C, H, W) or a number of attacked classes that the search does not support."""
    if len(image_shape) != 3 or image_shape[0] not in (1, 3) or image_shape[1] != image_shape[2]:
        raise SettingError(
            f"Semantic enhancement takes square RGB or grey images, (3 or 1, H, H), but got {tuple(image_shape)}. "
            "Crop them to a square."
        )
    known = len(model.classes)
    if attacked not in (None, known):
        raise SettingError(
            f"The attacked model has {attacked} classes, but the diffusion model has {known}, {model.classes[0].name} "
            f"to {model.classes[-1].name}, so their labels differ in meaning. Set `model` to a diffusion model of the "
            "attacked classes, or omit semantic enhancement."
        )


def _refuse_unknown(model: ConditionalModel, labels: Tensor) -> None:
    """Raise SettingError for labels that are not among the model's classes."""
    unknown = labels[(labels < 0) | (labels >= len(model.classes))].unique().tolist()
    if unknown:
        raise SettingError(
            f"The diffusion model has {len(model.classes)} classes, {model.classes[0].name} to "
            f"{model.classes[-1].name}, but the labels {unknown[:5]} are not among them. Set `model` to a diffusion "
            "model of the attacked classes, or omit semantic enhancement."
        )
