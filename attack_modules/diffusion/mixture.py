"""A diffusion model of small images given their class that needs no network: a mixture of Gaussians, fitted by EM.

Of a mixture of Gaussians the expected clean image under noise is known in closed form, and so is everything that
diffusion asks of a model. It is fitted in a minute on one CPU core and evaluated in a millisecond; what it knows of a
class are its layouts and colours, not its objects.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from attack_modules.diffusion.classes import CIFAR10, ImageClass
from attack_modules.diffusion.conditional import ConditionalModel, edm_alphas
from attack_modules.diffusion.model_file import opened_model, save_model
from fl_lightning.download import CHECKPOINTS
from fl_lightning.errors import SettingError

SHIPPED = CHECKPOINTS / "cifar10_mixture.safetensors"

COLOURS = [[3**-0.5] * 3, [2**-0.5, 0.0, -(2**-0.5)], [6**-0.5, -2 * 6**-0.5, 6**-0.5]]
"""Orthonormal: grey, red against blue, green against magenta."""


class Posterior(NamedTuple):
    """What noisy images tell of their components."""

    shares: Tensor
    """(N, K) probability of each component."""
    log_likelihood: Tensor
    """(N,) logarithm of the noisy images' density."""


class GaussianMixture(ConditionalModel):
    """Images of each class as a mixture of Gaussians, independent in the coefficients of a cosine transform.

    Its latents are those coefficients, of images in [-1, 1]. The transform is orthonormal, so that noise in pixels is
    the same noise there.

    Args:
        components: Gaussians a class.
        image_size: height and width of the images.
        class_names: one a class, in the order of the labels.
        guidance: scale of classifier-free guidance; 1 for none.
    """

    def __init__(
        self,
        components: int = 40,
        image_size: int = 32,
        class_names: list[str] = list(CIFAR10),  # noqa: B006 - never changed
        guidance: float = 3.0,
    ) -> None:
        super().__init__()
        if components < 1 or guidance < 1:
            raise SettingError(
                f"A mixture needs components >= 1 and guidance >= 1, but got {components} and {guidance}."
            )
        self.settings = {"components": components, "image_size": image_size, "class_names": list(class_names)}
        self.classes = [ImageClass(name) for name in class_names]
        self.components = components
        self.guidance = guidance
        self.image_size = image_size
        self.latent_shape = (3, image_size, image_size)
        self.register_buffer("alphas", edm_alphas(), persistent=False)
        self.register_buffer("cosines", cosine_transform(image_size), persistent=False)
        self.register_buffer("colours", torch.tensor(COLOURS), persistent=False)
        shape = (len(class_names), components)
        self.register_buffer("means", torch.zeros(*shape, 3 * image_size**2))
        self.register_buffer("variances", torch.ones(*shape, 3 * image_size**2))
        self.register_buffer("weights", torch.full(shape, 1 / components))

    def encode(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) images in [0, 1] -> (N, 3, H, W) coefficients."""
        return torch.einsum("dc,nchw,kh,lw->ndkl", self.colours, 2 * images - 1, self.cosines, self.cosines)

    def decode(self, latents: Tensor) -> Tensor:
        images = torch.einsum("dc,ndkl,kh,lw->nchw", self.colours, latents, self.cosines, self.cosines)
        return (images + 1) / 2

    def of_class(self, label: int) -> tuple[Tensor, Tensor, Tensor]:
        """One class's components: (K, D) means and variances, (K,) weights."""
        return self.means[label], self.variances[label], self.weights[label]

    def posterior(self, noisy: Tensor, variance: float, components: tuple[Tensor, Tensor, Tensor]) -> Posterior:
        """Which components noisy images may come from.

        Args:
            noisy: (N, D) coefficients plus noise.
            variance: of the noise.
            components: (K, D) means and variances, (K,) weights.
        """
        means, variances, weights = components
        precision = 1 / (variances + variance)
        distance = (
            noisy.square() @ precision.T - 2 * noisy @ (means * precision).T + (means.square() * precision).sum(1)
        )
        normaliser = (variances + variance).log().sum(1) + noisy.shape[1] * math.log(2 * math.pi)
        joint = weights.clamp_min(1e-12).log() - (distance + normaliser) / 2
        return Posterior(joint.softmax(1), joint.logsumexp(1))

    def denoise(self, noisy: Tensor, variance: float, components: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """(N, D) coefficients plus noise -> (N, D) expected clean coefficients; see `posterior`."""
        means, variances, _ = components
        shares = self.posterior(noisy, variance, components).shares
        kept = variances / (variances + variance)  # Wiener's filter of each component
        return shares @ kept * noisy + shares @ ((1 - kept) * means)

    def noise(self, latents: Tensor, timestep: int, labels: Tensor) -> Tensor:
        alpha = float(self.alphas[timestep])
        variance, noisy = 1 / alpha - 1, latents.flatten(1) / alpha**0.5
        clean = torch.empty_like(noisy)
        for label in labels.unique().tolist():
            here = labels == label
            clean[here] = self.denoise(noisy[here], variance, self.of_class(label))
        if self.guidance > 1:
            weights = self.weights.flatten() / len(self.classes)
            free = self.denoise(noisy, variance, (self.means.flatten(0, 1), self.variances.flatten(0, 1), weights))
            clean = free + self.guidance * (clean - free)
        return ((noisy - clean) / variance**0.5).view_as(latents)

    def noise_variance(self, images: Tensor, labels: Tensor) -> Tensor:
        """The variance under which the images are likeliest, given their classes.

        Images smaller than the mixture's are means over its blocks of pixels: cosines, damped by a known factor.
        """
        side = images.shape[-1]
        block = self.image_size // side
        if side * block != self.image_size:
            return super().noise_variance(images, labels)
        planes = images.shape[1]  # of a grey image, the grey one alone
        small = cosine_transform(side).to(images)
        centred = 2 * images.expand(-1, 3, -1, -1) - 1
        coefficients = torch.einsum("dc,nchw,kh,lw->ndkl", self.colours, centred, small, small)
        coefficients = block * coefficients[:, :planes].flatten(1)
        frequency = torch.arange(side, device=images.device)
        angles = math.pi / self.image_size * (frequency[:, None] * (torch.arange(block, device=images.device) + 0.5))
        centre = math.pi / self.image_size * frequency * block / 2
        damping = (angles - centre[:, None]).cos().mean(1)
        gain = (damping[:, None] * damping).expand(planes, side, side).flatten()
        variances = torch.logspace(-5, -0.3, 32, device=images.device)
        likelihoods = images.new_empty(len(variances), len(images))
        for label in labels.unique().tolist():
            here, (means, spread, weights) = labels == label, self.of_class(label)
            low = [part.view(-1, *self.latent_shape)[:, :planes, :side, :side].flatten(1) for part in (means, spread)]
            components = (low[0] * gain, low[1] * gain.square(), weights)
            for index, variance in enumerate(variances.tolist()):
                noise = (2 * block) ** 2 * variance * (3 if planes == 1 else 1)  # three equal channels add up
                likelihoods[index, here] = self.posterior(coefficients[here], noise, components).log_likelihood
        return variances[likelihoods.argmax(0)]

    def save(self, path: Path) -> None:
        """Write the components, in half precision, and settings to one safetensors file, which is whole or not there.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        save_model(self, self.settings, path)


def cosine_transform(size: int) -> Tensor:
    """(size, size) the orthonormal cosine transform (DCT-II), frequencies by positions."""
    position, frequency = torch.arange(size) + 0.5, torch.arange(size)[:, None]
    cosines = (2 / size) ** 0.5 * torch.cos(math.pi / size * frequency * position)
    cosines[0] /= 2**0.5
    return cosines


class FittedMixture(GaussianMixture):
    """The `GaussianMixture` in a file that `MixtureFit` wrote, by default the shipped one of CIFAR-10.

    Args:
        weights: the file.
        guidance: scale of classifier-free guidance; 1 for none.

    Raises:
        MissingFile: there is no such file.
        StorageError: it is cut short, or no such mixture.
    """

    def __init__(self, weights: Path = SHIPPED, guidance: float = 3.0) -> None:
        missing = (
            f"There is no mixture at '{weights}'. Fit one with `python cli.py fit --config "
            "configs/cifar10_mixture.yaml`, or name another file."
        )
        advice = "Name a file that fitting exported, `mixture.safetensors` in its run directory."
        with opened_model(weights, missing, "a mixture", advice) as (facts, state):
            super().__init__(**json.loads(facts["settings"]), guidance=guidance)
            self.load_state_dict(state)


class MixtureFit(LightningModule):
    """Fits a `GaussianMixture` by expectation maximisation (Dempster et al. 1977); an epoch is one iteration.

    Its data is a dataset with one client, such as `CIFAR10`, whose images count once more reflected. The components
    start at random images of their class, with the class's variances.

    Args:
        model: the mixture.
        floor: least variance of a coefficient.
        prior_count: images' worth of the class's variances in every component's, which keeps small components sane.
        export: where the mixture goes after every epoch; null for `mixture.safetensors` in the run directory.
        seed: of the images that components start at.
    """

    def __init__(
        self,
        model: GaussianMixture,
        floor: float = 1e-4,
        prior_count: float = 5.0,
        export: Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if floor <= 0 or prior_count < 0:
            raise SettingError(f"`model` needs floor > 0 and prior_count >= 0, but got {floor} and {prior_count}.")
        self.automatic_optimization = False
        self.mixture = model
        self.floor = floor
        self.prior_count = prior_count
        self.export = export
        self.seed = seed

    def configure_optimizers(self) -> None:
        """None: the maximum is known in closed form."""

    def on_train_start(self) -> None:
        """Take random images of each class as means, and the class's variances."""
        mixture, generator = self.mixture, torch.Generator().manual_seed(self.seed)
        batches = list(self.trainer.train_dataloader)
        for label in range(len(mixture.classes)):
            images = torch.cat([images[those == label] for images, those in batches])
            if len(images) < mixture.components:
                raise SettingError(
                    f"Class {label} has {len(images)} images, but {mixture.components} components start at one each. "
                    "Lower `model.model.components`, or give more images."
                )
            coefficients = mixture.encode(images).flatten(1)
            chosen = torch.randperm(len(images), generator=generator)[: mixture.components]
            mixture.means[label] = coefficients[chosen]
            mixture.variances[label] = coefficients.var(0).clamp_min(self.floor)
        self.class_variances = mixture.variances[:, 0].clone()

    def on_train_epoch_start(self) -> None:
        self.counts = torch.zeros_like(self.mixture.weights)
        self.sums = torch.zeros_like(self.mixture.means)
        self.squares = torch.zeros_like(self.mixture.means)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Expectation: add a batch to the sums over images."""
        images, labels = batch
        coefficients = self.mixture.encode(torch.cat([images, images.flip(3)])).flatten(1)
        labels = labels.repeat(2)
        for label in labels.unique().tolist():
            here = coefficients[labels == label]
            shares = self.mixture.posterior(here, 0.0, self.mixture.of_class(label)).shares
            self.counts[label] += shares.sum(0)
            self.sums[label] += shares.T @ here
            self.squares[label] += shares.T @ here.square()

    def on_train_epoch_end(self) -> None:
        """Maximisation, and export."""
        mixture, counts = self.mixture, self.counts[:, :, None].clamp_min(1e-6)
        mixture.weights.copy_(self.counts / self.counts.sum(1, keepdim=True))
        mixture.means.copy_(self.sums / counts)
        spread = (self.squares - counts * mixture.means.square()).clamp_min(0)
        prior = self.prior_count * self.class_variances[:, None]
        mixture.variances.copy_(((spread + prior) / (counts + self.prior_count)).clamp_min(self.floor))
        if self.trainer.is_global_zero and (self.export or self.trainer.log_dir):
            mixture.save(self.export or Path(self.trainer.log_dir) / "mixture.safetensors")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the density of images nobody saw, and how many their own class's mixture makes likeliest."""
        images, labels = batch
        coefficients, mixture = self.mixture.encode(images).flatten(1), self.mixture
        by_class = [mixture.posterior(coefficients, 0.0, mixture.of_class(c)) for c in range(len(mixture.classes))]
        likelihoods = torch.stack([posterior.log_likelihood for posterior in by_class], dim=1)
        own = likelihoods.gather(1, labels[:, None]).mean() / coefficients.shape[1]
        self.log("log_density", own, prog_bar=True, batch_size=len(images))
        correct = (likelihoods.argmax(1) == labels).float().mean()
        self.log("classified", correct, prog_bar=True, batch_size=len(images))

    test_step = validation_step
