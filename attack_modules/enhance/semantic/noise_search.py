"""The search for the initial noise whose sample agrees with a reconstruction."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.attack import Reconstruction
from attack_modules.diffusion.conditional import ConditionalModel, ddim, explicit_timesteps
from attack_modules.enhance.noise_level import wavelet_noise
from fl_lightning.errors import SettingError
from fl_lightning.seeds import seed_of


class Step(NamedTuple):
    """What one step of a search found, an entry an image that is still sought."""

    sought: Tensor
    """(n,) long: which images of the search these are."""
    images: Tensor
    """(n, 3, M, M) the samples, in [0, 1]."""
    pixel_loss: Tensor
    """(n,) mean squared distance to the reconstruction, of pixels in [0, 1], at its resolution."""
    score: Tensor
    """(n,) what the stopping rule goes by, less is better."""


class NoiseSearch(nn.Module):
    """The search for the initial noise whose sample looks like a reconstruction (MDE, arXiv 2410.04661, section IV).

    Every step samples by deterministic DDIM and takes the predicted noises for constants. The sample is then an affine
    function of the initial noise, so that the gradient needs the decoder alone and no pass through the network. It is
    exact for that function, and no more than a direction for the sampler itself.

    After every step the noise is scaled back to the length of normal noise, sqrt(d) in d dimensions, because the model
    has seen no other: what is free to grow fits the reconstruction no better, and looks less like its class.

    What the attacker cannot know is not compared: finer detail than the reconstruction's resolution, and the colours of
    a grey one.

    Every image has a stopping rule of its own, so that it depends on no other. Its search ends when `patience` steps
    have not undercut the best score by more than `margin`, and the best is what it keeps. The score is the disagreement
    with what was observed, where the attack can tell it an image at a time. Otherwise it is the pixel loss, down to the
    reconstruction's own noise (`wavelet_noise`), where the search ends at once: to fit that noise is no merit.

    Args:
        model: the diffusion model.
        reconstruction: images (N, C, H, W) with H = W in [0, 1], C 1 or 3, and labels (N,).
        timesteps: number of DDIM's steps.
        starts: draws of initial noise an image, of which the one with the best score goes on.
        patience: steps without improvement of an image, after which its search ends.
        margin: relative improvement of the score that counts.
        seed: of the draws; every image has its own.

    Raises:
        SettingError: an image is not square or neither RGB nor grey, or a label is none of the model's.
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
        _refuse_unfit(model, reconstruction)
        self._model = (model,)  # no submodule: checkpoints are to hold the search alone
        self.timesteps = explicit_timesteps(timesteps, len(model.alphas))
        self.patience = patience
        self.margin = margin
        self.disagreement = reconstruction.disagreement
        self.shape = images.shape[1:]
        side = max(1, min(images.shape[-1] // latent_downscale, model.image_size))
        self.register_buffer("target", F.adaptive_avg_pool2d(images.float(), side))
        self.register_buffer("labels", labels)
        self.register_buffer("tolerance", wavelet_noise(self.target))
        self.register_buffer("best", images.new_zeros(len(images), 3, model.image_size, model.image_size))
        self.register_buffer("best_score", torch.full((len(images),), torch.inf))
        self.register_buffer("best_step", torch.zeros(len(images), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        numbers = range(len(images)) if reconstruction.numbers is None else reconstruction.numbers.tolist()
        generators = [torch.Generator().manual_seed(seed_of(seed, number)) for number in numbers]
        draws = [typical(torch.randn(starts, *model.latent_shape, generator=generator)) for generator in generators]
        self.noise = nn.Parameter(self._best_start(torch.stack(draws, dim=1).to(images.device)))

    @property
    def model(self) -> ConditionalModel:
        """The diffusion model, which is not searched for."""
        return self._model[0]

    @property
    def finished(self) -> Tensor:
        """(N,) bool: the images whose search has ended."""
        finished = self.steps - self.best_step > self.patience
        if self.disagreement is None:
            finished |= (1 - self.margin) * self.best_score <= self.tolerance  # no improvement would count any more
        return finished

    def step(self) -> tuple[Tensor, Step]:
        """Sample once for each image that is still sought, and remember what is better than before.

        Of a search that has ended, all images are looked at once more.

        Returns:
            The loss to be minimised, the sum of the pixel losses, so that no image feels another; and what was found.
        """
        with torch.no_grad():
            self.noise.copy_(typical(self.noise))
        finished = self.finished
        sought = (~finished | finished.all()).nonzero()[:, 0]
        noise, labels = self.noise[sought], self.labels[sought]
        sample = ddim(self.model, noise.detach(), labels, self.timesteps)
        # The affine function at its own foot: its value is the sample, its slope the gain.
        images = self.model.decode(sample.latents + sample.gain * (noise - noise.detach()))
        pixel_loss = self._pixel_loss(images, sought)
        images = images.detach().clamp(0, 1)
        found = Step(sought, images, pixel_loss.detach(), self._score(images, pixel_loss.detach(), sought))
        better = found.score < (1 - self.margin) * self.best_score[sought]
        self.best[sought[better]] = images[better]
        self.best_score[sought[better]] = found.score[better]
        self.best_step[sought[better]] = self.steps
        self.steps += 1
        return pixel_loss.sum(), found

    def seen(self, images: Tensor) -> Tensor:
        """(N, 3, M, M) images -> what a reconstruction would show of them, of the target's shape."""
        images = F.adaptive_avg_pool2d(images, self.target.shape[-1])
        return images if self.target.shape[1] == 3 else images.mean(1, keepdim=True)

    def fitted(self, images: Tensor) -> Tensor:
        """(N, 3, M, M) images -> (N, C, H, W), as the reconstruction came."""
        if images.shape[-2:] != self.shape[-2:]:
            images = F.interpolate(images, self.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
        return images if self.shape[0] == 3 else images.mean(1, keepdim=True)

    def _pixel_loss(self, images: Tensor, sought: Tensor) -> Tensor:
        return (self.seen(images) - self.target[sought]).square().mean((1, 2, 3))

    def _score(self, images: Tensor, pixel_loss: Tensor, sought: Tensor) -> Tensor:
        if self.disagreement is None:
            return torch.maximum(pixel_loss, self.tolerance[sought])
        with torch.no_grad():
            return self.disagreement(self.fitted(images), sought).to(pixel_loss)

    @torch.no_grad()
    def _best_start(self, draws: Tensor) -> Tensor:
        """The best of (starts, N, *latent_shape) draws for each image: (N, *latent_shape)."""
        if len(draws) == 1:
            return draws[0]
        scores, every = [], torch.arange(draws.shape[1], device=draws.device)
        for noise in draws:
            images = self.model.decode(ddim(self.model, noise, self.labels, self.timesteps).latents)
            pixel_loss = self._pixel_loss(images, every)  # of starts that are all within the noise, too, the nearest
            scores.append(self._score(images.clamp(0, 1), pixel_loss, every) if self.disagreement else pixel_loss)
        return draws[torch.stack(scores).argmin(0), every]


def typical(noise: Tensor) -> Tensor:
    """(N, ...) -> (N, ...) noise in the same direction, of the length at which normal noise concentrates."""
    lengths = noise.flatten(1).norm(dim=1) / noise[0].numel() ** 0.5
    return noise / lengths.view(-1, *[1] * (noise.ndim - 1))


def _refuse_unfit(model: ConditionalModel, reconstruction: Reconstruction) -> None:
    """Raises SettingError for images or labels that the search cannot take."""
    images, labels = reconstruction.images, reconstruction.labels
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
        raise SettingError(
            f"Semantic enhancement takes square RGB or grey images, (N, 3 or 1, H, H), but got {tuple(images.shape)}. "
            "Cut them to a square."
        )
    known, attacked = len(model.classes), reconstruction.num_classes
    if attacked not in (None, known):
        raise SettingError(
            f"The attacked model has {attacked} classes, but the diffusion model {known}, {model.classes[0].name} to "
            f"{model.classes[-1].name}, so that their labels mean different things. Give `model` one that was trained "
            "on the attacked classes, or go without semantic enhancement."
        )
    unknown = labels[(labels < 0) | (labels >= len(model.classes))].unique().tolist()
    if unknown:
        raise SettingError(
            f"The diffusion model knows {len(model.classes)} classes, {model.classes[0].name} to "
            f"{model.classes[-1].name}, but the labels {unknown[:5]} are none of them. Give `model` one that was "
            "trained on the attacked classes, or go without semantic enhancement."
        )
