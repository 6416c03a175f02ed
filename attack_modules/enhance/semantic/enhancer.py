"""Semantic enhancement: an image of the inferred class that looks like the reconstruction."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from attack_modules.attack import Reconstruction
from attack_modules.diffusion.classes import class_index
from attack_modules.diffusion.conditional import ConditionalModel, ddim, explicit_timesteps
from attack_modules.diffusion.trained.class_conditional import TrainedConditional
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.enhance.noise_level import wavelet_noise
from attack_modules.enhance.semantic.search_report import SearchReport
from fl_lightning.data.images import PathLike, read_image, read_size
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
        images, labels, scale_factor = reconstruction.images, reconstruction.labels, reconstruction.scale_factor
        _refuse_unfit(model, reconstruction)
        self._model = (model,)  # no submodule: checkpoints are to hold the search alone
        self.timesteps = explicit_timesteps(timesteps, len(model.alphas))
        self.patience = patience
        self.margin = margin
        self.disagreement = reconstruction.disagreement
        self.shape = images.shape[1:]
        side = max(1, min(images.shape[-1] // scale_factor, model.image_size))
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


class SemanticEnhancer(LightningModule, Enhancer):
    """The paper's semantic enhancement, MDE: the initial noise of a class-conditional diffusion model IS the parameter.

    What comes out is an image of its class that agrees with the reconstruction as far as that goes; detail is the
    model's invention. As a model of `fit` it takes one image from `ReconstructedImage`; after an attack it takes the
    attack's images, with the labels that the attack was told or inferred.

    The defaults are the paper's. Beyond the paper: the best of several starts, noise that keeps its length, a rule that
    says when to stop, and a comparison at the resolution of the reconstruction, see `NoiseSearch`.

    Args:
        model: a class-conditional diffusion model; null for that of CIFAR-10 that is shipped.
        class_label: the class of `fit`'s image: index, synset or name. An attack's images bring their own.
        lr: learning rate of Adam.
        timesteps: of each sample.
        steps: at most, after an attack; in `fit` it is `trainer.max_steps`.
        starts: draws of initial noise an image, of which the best goes on.
        patience: steps without improvement of an image, after which its search ends.
        margin: relative improvement that counts.
        chunk_size: images that are searched for at once, which bounds memory and changes nothing else.
        checkpoint_every: steps between checkpoints of `fit`, from which `--ckpt_path` goes on.
        seed: of the starts in `fit`.
    """

    def __init__(
        self,
        model: ConditionalModel | None = None,
        class_label: int | str | None = None,
        lr: float = 0.01,
        timesteps: int = 250,
        steps: int = 100,
        starts: int = 1,
        patience: int = 20,
        margin: float = 0.01,
        chunk_size: int = 16,
        checkpoint_every: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(lr, timesteps, steps, starts, patience, chunk_size) <= 0 or not 0 <= margin < 1:
            raise SettingError(
                "`SemanticEnhancer` needs lr > 0, timesteps, steps, starts, patience and chunk_size >= 1, and margin "
                f"in [0, 1), but got lr={lr}, timesteps={timesteps}, steps={steps}, starts={starts}, "
                f"patience={patience}, chunk_size={chunk_size}, margin={margin}."
            )
        model = model or TrainedConditional()
        self._model = (model,)  # no submodule: checkpoints are to hold the search alone
        self.class_label = None if class_label is None else class_index(class_label, model.classes)
        self.lr = lr
        self.timesteps = timesteps
        self.max_steps = steps
        self.starts = starts
        self.patience = patience
        self.margin = margin
        self.chunk_size = chunk_size
        self.checkpoint_every = checkpoint_every
        self.seed = seed
        self.watch: Callable[[int, Tensor, Step], None] | None = None
        """Called by `enhance` at every step with its number, the images' indices and what was found."""

    @property
    def model(self) -> ConditionalModel:
        """The diffusion model."""
        return self._model[0]

    @property
    def noise_size(self) -> int:
        """Numbers in one image's initial noise."""
        return math.prod(self.model.latent_shape)

    def search(self, reconstruction: Reconstruction, seed: int) -> NoiseSearch:
        """The search for some images, at its start, on their device."""
        device = reconstruction.images.device
        settings = (self.timesteps, self.starts, self.patience, self.margin, seed)
        return NoiseSearch(self.model.to(device), reconstruction, *settings).to(device)

    @torch.inference_mode(False)  # `trainer.test` is in it, but the search differentiates
    def enhance(self, reconstruction: Reconstruction, seed: int) -> Tensor:
        images, labels = reconstruction.images.clone(), reconstruction.labels.clone()
        reconstruction = reconstruction._replace(images=images, labels=labels)
        if not len(images):
            return images
        chunks = []
        for indices in torch.arange(len(images)).split(self.chunk_size):
            search = self.search(reconstruction.part(indices), seed)
            optimizer = torch.optim.Adam([search.noise], lr=self.lr)
            for step in range(self.max_steps):
                with torch.enable_grad():
                    loss, found = search.step()
                if self.watch:
                    self.watch(step, indices[found.sought.cpu()], found)
                if search.finished.all():
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            chunks.append(search.fitted(search.best))
        return torch.cat(chunks)

    # What follows is `fit`.

    def configure_model(self) -> None:
        if hasattr(self, "found"):
            return
        if self.class_label is None:
            names = ", ".join(repr(known.name) for known in self.model.classes[:3])
            raise SettingError(f"Which class is the image of? Give `--model.class_label`, for instance {names}.")
        given: ReconstructedImage = self.trainer.datamodule
        images = given.image[None].to(self.trainer.strategy.root_device)
        labels = torch.tensor([self.class_label], device=images.device)
        self.found = self.search(Reconstruction(images, labels, given.scale_factor), self.seed)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.found.noise], lr=self.lr)

    def configure_callbacks(self) -> list[Callback]:
        checkpoint = ModelCheckpoint(
            filename="{step}",
            every_n_train_steps=self.checkpoint_every,
            save_last=True,
            auto_insert_metric_name=False,
        )
        return [checkpoint, SearchReport()]

    def training_step(self, batch: int, batch_idx: int) -> dict[str, Tensor | Step]:
        loss, found = self.found.step()
        self.log("pixel_loss", found.pixel_loss.mean(), prog_bar=True)
        if self.found.finished.all():
            self.trainer.should_stop = True
        return {"loss": loss, "found": found}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        theirs = checkpoint["state_dict"].get("found.target"), checkpoint["state_dict"].get("found.labels")
        ours = self.found.target.cpu(), self.found.labels.cpu()
        if any(their is None or not torch.equal(their.cpu(), our) for their, our in zip(theirs, ours, strict=True)):
            raise SettingError(
                "This checkpoint is of another image or another class. Name its own, or start without `--ckpt_path`."
            )


class ReconstructedImage(LightningDataModule):
    """One image in a file, to be enhanced by `fit`.

    Args:
        image: the file, of any size; its centre square is taken. A grey file stays grey: the colours are the model's.
        scale_factor: the image was reconstructed this much smaller and upsampled, 1 if it was not.
        seed: is not used; the command line sets it for all data.
    """

    def __init__(self, image: PathLike, scale_factor: int = 1, seed: int = 0) -> None:
        super().__init__()
        size, channels = read_size(image)
        if scale_factor < 1 or scale_factor > size:
            raise SettingError(
                f"`data.scale_factor` is {scale_factor}, but '{image}' has {size} pixels a side. Give a number from 1 "
                "to that, 1 for an image that was not upsampled."
            )
        self.scale_factor = scale_factor
        self.image = read_image(image, size, channels).float() / 255

    def train_dataloader(self) -> DataLoader:
        """One item for each step."""
        return DataLoader(range(max(self.trainer.max_steps, 1)), batch_size=None)


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
