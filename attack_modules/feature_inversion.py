"""Closed-form leakage, then each image alone from its own features."""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from attack_modules.attack import Attack, Reconstruction
from attack_modules.labels import local_steps
from attack_modules.leakage import Leakage, PeerTraining, leak
from attack_modules.priors import ChromaTotalVariation, Prior, annealed
from fl_lightning.client import parameters
from fl_lightning.errors import SettingError
from fl_lightning.models import ImageClassifier


class FeatureInversion(Attack):
    """Images whose features are those that linear algebra reads from the head's update; its parameters ARE the images.

    The head's part of the peers' update gives every image's features (`attack_modules.leakage`), so that what is left
    is N separate problems: Adam on `|features(x) - f|^2 / |f|^2` plus priors, with one forward and one backward pass of
    the convolutional part a step. `trainer.max_steps` is the number of steps.

    Args:
        lr: the attacker's own learning rate, of Adam on the pixels, with cosine decay to zero.
        priors: penalties that are added to the relative feature error; null for `ChromaTotalVariation`.
        anneal: factor on the priors' weights at the first and at the last step, geometric between.
        betas: of Adam. The second is short, because the gradient falls by orders of magnitude within a hundred steps.
        subtract_own: take the attacker's own update out of the aggregate first.
        chunk_size: images that are passed through the model at once, which bounds memory.
        checkpoint_every: steps between checkpoints.
    """

    def __init__(
        self,
        lr: float = 0.8,
        priors: list[Prior] | None = None,
        anneal: tuple[float, float] = (1.0, 0.01),
        betas: tuple[float, float] = (0.8, 0.99),
        subtract_own: bool = True,
        chunk_size: int = 16,
        checkpoint_every: int = 25,
    ) -> None:
        super().__init__(subtract_own, checkpoint_every)
        if lr <= 0 or chunk_size < 1 or min(anneal) < 0:
            raise SettingError(
                "`model` needs lr > 0, chunk_size >= 1 and anneal >= 0, but got "
                f"lr={lr}, chunk_size={chunk_size}, anneal={anneal}."
            )
        self.automatic_optimization = False  # one backward pass a chunk, so that memory holds one graph
        self.lr = lr
        self.priors = [ChromaTotalVariation(weight=1.0)] if priors is None else priors
        self.anneal = anneal
        self.betas = betas
        self.chunk_size = chunk_size

    def configure_model(self) -> None:
        if hasattr(self, "images"):
            return
        observation = self.the_observation()
        device = self.trainer.strategy.root_device
        update = self.observed_update()
        model = observation.build_model()
        beliefs, steps = observation.beliefs, local_steps(observation)
        self.leakage: Leakage = leak(
            {name: tensor for name, tensor in update.items() if name.startswith("head.")},
            {name: tensor for name, tensor in parameters(model).items() if name.startswith("head.")},
            PeerTraining(
                lr=beliefs.client_lr,
                steps=steps,
                num_images=beliefs.num_images,
                labels=None if beliefs.labels is None else torch.tensor(beliefs.labels),
            ),
        )
        found = self.leakage.diagnosis
        if found.separated < found.num_images:
            rank_zero_warn(
                f"Only {found.separated} of {found.num_images} images could be told apart: they share classes, and no "
                "gates of the others were found. They mix into the features of some images, mostly of their class."
            )
        if len(self.leakage.labels.unique()) < len(self.leakage.labels) and len(model.head) == 1:
            rank_zero_warn(
                "Several images share a class. A head of one layer shows only the sum of their features, so each of "
                "them comes out as their mean; images that are alone in their class are not affected."
            )
        # Features come as their mean over the local steps, which is nearly that of the weights half way.
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                tensor -= (steps - 1) / (2 * steps) * update[name]
        self.embedder = (model.requires_grad_(False).to(device, memory_format=torch.channels_last),)  # no submodule
        self.features = self.leakage.features.to(device)
        self.register_buffer("labels", self.leakage.labels)
        self.images = nn.Parameter(torch.full((len(self.labels), *observation.image_shape), 0.5))
        self.register_buffer("best", self.images.detach().clone())
        self.register_buffer("best_loss", torch.full((len(self.labels),), torch.inf))

    @property
    def model(self) -> ImageClassifier:
        """The global model half way through the peers' training."""
        return self.embedder[0]

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        optimizer = torch.optim.Adam([self.images], lr=self.lr, betas=self.betas)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(self.trainer.max_steps, 1))]

    def training_step(self, batch: int, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        factor = annealed(self.anneal, self.global_step, self.trainer.max_steps)
        errors = []
        for chunk in torch.arange(len(self.images), device=self.device).split(self.chunk_size):
            images = self.images[chunk].contiguous(memory_format=torch.channels_last)
            error = self.feature_error(images, self.features[chunk])
            prior = sum((prior.weight * prior(images) for prior in self.priors), torch.zeros_like(error))
            self.manual_backward((error + factor * prior).sum())  # a sum: no image feels another
            self._remember(chunk, (error + self.anneal[1] * prior).detach())
            errors.append(error.detach())
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            self.images.clamp_(0, 1)
        self.log("feature_error", torch.cat(errors).mean(), prog_bar=True)

    def feature_error(self, images: Tensor, features: Tensor) -> Tensor:
        """(N,) relative squared distance of the images' features (N, D) to those that leaked."""
        return (self.model.embed(images) - features).square().sum(1) / features.square().sum(1)

    @torch.no_grad()
    def _remember(self, chunk: Tensor, losses: Tensor) -> None:
        """Keep every image's best iterate, judged with the last step's weight of the priors."""
        better = chunk[losses < self.best_loss[chunk]]
        self.best[better] = self.images[better]
        self.best_loss[chunk] = torch.minimum(self.best_loss[chunk], losses.to(self.best_loss))

    def reconstruction(self) -> Reconstruction:
        return Reconstruction(self.best.float().clamp(0, 1), self.labels)

    def introduction(self) -> str:
        found, observation = self.leakage.diagnosis, self.the_observation()
        unknown = self.images[0].numel()
        return (
            f"Attack: closed-form leakage. The head's update holds {found.num_images} images, {found.separated} told "
            f"apart (singular value gap {found.gap:.3g}, residual {found.residual:.2%}, condition number "
            f"{found.conditioning:.3g}, drift {found.drift:.2%}, outside {found.outside:.2%}), trained by "
            f"{len(self.leakage.peers.unique())} peer(s) as far as it shows; labels "
            f"{observation.sources['labels']}.\n"
            f"From {self.features.shape[1]:,} features each, {unknown:,} unknown numbers an image are found by Adam at "
            f"rate {self.lr:g} for {self.trainer.max_steps} steps."
        )
