"""Semantic enhancement: an image of the inferred class that looks like the reconstruction."""

import math
from collections.abc import Callable

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from attack_modules.attack import Reconstruction
from attack_modules.diffusion.classes import class_index
from attack_modules.diffusion.conditional import ConditionalModel
from attack_modules.diffusion.trained.class_conditional import TrainedConditional
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.enhance.semantic.noise_search import NoiseSearch, Step
from attack_modules.enhance.semantic.reconstructed_image import ReconstructedImage
from attack_modules.enhance.semantic.search_report import SearchReport
from fl_lightning.errors import SettingError


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
        theirs = checkpoint["state_dict"].get("found.target"), checkpoint["state_dict"].get("found.labels")
        ours = self.found.target.cpu(), self.found.labels.cpu()
        if any(their is None or not torch.equal(their.cpu(), our) for their, our in zip(theirs, ours, strict=True)):
            raise SettingError(
                "This checkpoint is of another image or another class. Name its own, or start without `--ckpt_path`."
            )
