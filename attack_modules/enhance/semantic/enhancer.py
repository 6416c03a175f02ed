"""Semantic enhancement: generates an image of the inferred class that resembles the reconstruction."""

import math
from collections.abc import Callable

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from attack_modules.attack import Reconstruction
from attack_modules.diffusion.classes import class_index
from attack_modules.diffusion.conditional import ConditionalModel, explicit_timesteps
from attack_modules.diffusion.trained.class_conditional import TrainedConditional
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.enhance.semantic.noise_search import NoiseSearch, Step, refuse_unfit
from attack_modules.enhance.semantic.reconstructed_image import ReconstructedImage
from attack_modules.enhance.semantic.search_report import SearchReport
from fl_lightning.errors import SettingError, positive
from fl_lightning.models import ImageShape


class SemanticEnhancer(LightningModule, Enhancer):
    """The paper's semantic enhancement, MDE: optimises the initial noise of a class-conditional diffusion model.

    The result is an image of the given class that matches the reconstruction up to the latter's resolution; finer
    detail is invented by the model. In `fit` the input is one image from `ReconstructedImage`; after an attack, it is
    the attack's images with their known or inferred labels.

    The defaults are the paper's. Extensions of the paper are several starts, noise of constant norm, early stopping and
    a comparison at the resolution of the reconstruction, see `NoiseSearch`.

    Args:
        model: class-conditional diffusion model; null for the shipped CIFAR-10 model.
        class_label: class of the image in `fit`: index, synset or name. After an attack, its labels are used.
        lr: learning rate of Adam.
        timesteps: number of DDIM steps per sample.
        steps: maximum number of optimisation steps after an attack; `fit` uses `trainer.max_steps`.
        starts: number of initial noise draws per image, the best of which is optimised.
        patience: number of steps without improvement of an image, after which its search stops.
        margin: minimum relative improvement of the score that `patience` counts; a smaller one is kept, too.
        chunk_size: number of images optimised at once, which bounds memory and does not change the result.
        checkpoint_every: steps between checkpoints of `fit`, from which `--ckpt_path` resumes.
        seed: seed of the starts in `fit`; null for that of `seed_everything`.

    Raises:
        SettingError: a setting is out of range, or the model has no class `class_label`.
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
        seed: int | None = None,
    ) -> None:
        super().__init__()
        counts = timesteps, steps, starts, patience, chunk_size, checkpoint_every
        if not positive(lr, *counts) or not 0 <= margin < 1:
            raise SettingError(
                "`SemanticEnhancer` needs lr > 0, timesteps, steps, starts, patience, chunk_size and checkpoint_every "
                f">= 1, and margin in [0, 1), but got lr={lr}, timesteps={timesteps}, steps={steps}, starts={starts}, "
                f"patience={patience}, chunk_size={chunk_size}, checkpoint_every={checkpoint_every}, margin={margin}."
            )
        model = model or TrainedConditional()
        explicit_timesteps(timesteps, len(model.alphas))  # refuse more than the model has now
        self._model = (model,)  # not a submodule, so that checkpoints exclude it
        self.class_label = None if class_label is None else class_index(class_label, model.classes)
        self.lr = lr
        self.timesteps = timesteps
        self.max_steps = steps
        self.starts = starts
        self.patience = patience
        self.margin = margin
        self.chunk_size = chunk_size
        self.checkpoint_every = checkpoint_every
        self.seed = seed or 0
        self.watch: Callable[[int, Tensor, Step], None] | None = None
        """Called by `enhance` at every step with the step number, the images' indices and the results."""

    @property
    def model(self) -> ConditionalModel:
        """The diffusion model."""
        return self._model[0]

    @property
    def noise_size(self) -> int:
        """Number of values in one image's initial noise."""
        return math.prod(self.model.latent_shape)

    def check(self, image_shape: ImageShape, num_classes: int | None) -> None:
        refuse_unfit(self.model, image_shape, num_classes)

    def search(self, reconstruction: Reconstruction, seed: int) -> NoiseSearch:
        """Set up the noise search for a reconstruction, on the device of its images."""
        device = reconstruction.images.device
        settings = (self.timesteps, self.starts, self.patience, self.margin, seed)
        return NoiseSearch(self.model.to(device), reconstruction, *settings).to(device)

    @torch.inference_mode(False)  # `trainer.test` enables it, but the search needs gradients
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
                    self.watch(step, indices[found.active.cpu()], found)
                if search.finished.all():
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            chunks.append(search.fitted(search.best))
        return torch.cat(chunks)

    # Lightning hooks for `fit`.

    def configure_model(self) -> None:
        if hasattr(self, "found"):
            return
        if self.class_label is None:
            names = ", ".join(repr(known.name) for known in self.model.classes[:3])
            raise SettingError(f"The class of the image is not set. Give `--model.class_label`, for example {names}.")
        given: ReconstructedImage = self.trainer.datamodule
        images = given.image[None].to(self.trainer.strategy.root_device)
        labels = torch.tensor([self.class_label], device=images.device)
        with torch.device("cpu"):  # Lightning's default here is the device, but random numbers are drawn on the CPU
            self.found = self.search(Reconstruction(images, labels, given.latent_downscale), self.seed)

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
        state = checkpoint["state_dict"]
        theirs = state.get("found.target"), state.get("found.labels")
        ours = self.found.target.cpu(), self.found.labels.cpu()
        if any(their is None or not torch.equal(their.cpu(), our) for their, our in zip(theirs, ours, strict=True)):
            raise SettingError(
                "This checkpoint is of another image or another class. Give a checkpoint of this search, or omit "
                "`--ckpt_path` to start from the beginning."
            )
        for name in ("score", "step"):  # earlier versions kept only what `patience` counts
            state.setdefault(f"found.counted_{name}", state[f"found.best_{name}"])
