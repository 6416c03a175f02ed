"""Feature inversion: features from the closed form, then each image on its own from its features."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from attack_modules.analytic.defended_head import Expected
from attack_modules.analytic.observed_head import head_parameters, training_knowledge
from attack_modules.analytic.row_space import space_bytes
from attack_modules.analytic.suspicion import qualified, suspected_defenses
from attack_modules.attack import Attack, Level, Reconstruction, Verdict
from attack_modules.feature_inversion.batch_statistics import BatchStatistics
from attack_modules.feature_inversion.controls import (
    ERRORS,
    STRETCHED,
    KnownImages,
    control_images,
    gain_of_contrast,
    known_images,
    mean_colour_psnr,
    mean_psnr,
)
from attack_modules.feature_inversion.convolutions import Convolutions
from attack_modules.feature_inversion.decoder import FeatureDecoder
from attack_modules.feature_inversion.drift import SimulatedRound, full_batches, simulate_peers
from attack_modules.feature_inversion.guidance import DiffusionGuidance
from attack_modules.feature_inversion.introduction import of_closed_form, of_defence, of_start
from attack_modules.feature_inversion.learned_decoder import LearnedDecoder, PhotographDecoder
from attack_modules.feature_inversion.memory import peak_bytes
from attack_modules.feature_inversion.objective import Objective
from attack_modules.feature_inversion.pooling_positions import PoolingPositions
from attack_modules.feature_inversion.refinement import Refinement
from attack_modules.feature_inversion.rounds import RoundsReader, SameImages
from attack_modules.feature_inversion.scale import found_scale
from attack_modules.feature_inversion.soft_pooling import soften
from attack_modules.feature_inversion.verdict import DRIFTING, LEAST_GAIN, UNLIKE, Evidence, judge
from attack_modules.priors import ChromaTotalVariation, Prior
from attack_modules.simulation.feature_map import for_speed
from attack_modules.simulation.half_way import model_half_way
from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.simulation.low_rank import LowRank
from attack_modules.threat_model.observed import RoundsSummary
from attack_modules.threat_model.requirements import LinearHead, ReadableDropout, Requirement, TrainedHead
from fl_lightning.client import Tensors
from fl_lightning.errors import SettingError, non_negative, positive
from fl_lightning.models import ImageClassifier
from fl_lightning.models.freezing import batch_statistics

FINAL_RATE = 0.02
"""Share of the learning rate that is left at the last step."""
FALL = 2.7
"""Power of the share of steps done, to which the logarithm of the rate falls in proportion."""
IN_FLOAT32 = 0.25
"""Share of the steps, the last ones, that are computed in float32 in a run of mixed precision too: its rounding is what
then limits the images."""
MOST_NOISE = 3.0
"""Relative noise beyond which features tell nothing."""
TRIED = 4
"""Known photographs on which it is tried whether inversion improves what a learned decoder makes of them."""
TIMED = 2
"""Steps of the control images by which the time of the verdict is told."""
CPU_CHUNK = 16
"""Images that pass through the model at once on a CPU, which more would not keep busier."""
RESIMULATIONS = 2
"""Default number of simulations of the peers' training without a refinement."""

REFINE = "The local training changes the model much (see the drift): configs/refined.yaml would give better images."

FORMER_KEYS = {
    "sought": "refinement.target_features",
    "trusted": "refinement.best_features",
    "lacking": "refinement.best_residual",
    "ended": "refinement.stopped",
    "denoised": "guidance.denoised",
    "sigmas": "guidance.sigmas",
    "errors": "guidance.errors",
}
"""Names of buffers in checkpoints of version 0.1 -> today's."""


class FeatureInversion(Attack):
    """Images whose features are those that the closed form reads from the head's update; its parameters ARE the images.

    The head's part of the peers' update gives every image's features (`analytic.leak`), which leaves N separate
    problems: Adam on the feature error `E = |features(x) - f|^2 / |f|^2` plus priors P, with one forward and one
    backward pass of the convolutions a step. `trainer.max_steps` is the number of steps. The start is a linear
    regression from features to pixels (`FeatureDecoder`), or grey images where the features are not a map; with
    `decoder`, one that is learned from photographs, unless held-out ones come out worse.

    E falls by four orders of magnitude, further for some images and models than for others, and a weight of P that
    suits the start over-regularises late iterations. So each image minimises `log E + balance * log P`: both terms
    count by their relative changes throughout. Where E stays high because no image has these features, P would
    dominate: its weight beside E, `balance * E / P`, is limited by `prior_limit`, which falls. In a run of mixed
    precision P is computed in float32, and so is the whole of the last quarter of the steps.

    Features leak as their mean over the peers' local steps, which is nearly their value under the model half way. The
    remaining difference is simulated a few times from the current images, peer by peer (`simulate_peers`).

    Args:
        lr: initial learning rate of Adam on the pixels.
        priors: penalties whose sum is P; null for `ChromaTotalVariation`.
        balance: weight of the relative change of P beside that of E.
        prior_limit: upper limit of the weight of P beside E at the first and at the last step, geometric between.
        betas: of Adam. Deep models need longer memories: (0.9, 0.99) gains 1 dB with ResNet9 and loses 2 with LeNet5.
        subtract_own: subtract the attacker's own update from the aggregate first.
        resimulations: how often, evenly spread over the steps, the peers' training is simulated; 0 for never, null for
            2, or for what `refinement` asks for.
        chunk_size: images that pass through the model at once, which bounds memory; null for 16 on a CPU, and on a GPU
            for as many as its memory holds.
        checkpoint_every: steps between checkpoints.
        refinement: corrects the leaked features with the simulated training; null for none.
        guidance: a diffusion prior as a further penalty; null for none.
        rounds: how several observed rounds are read; null for `SameImages`: the same peers and images in each.
        decoder: learns the start from public photographs, which pays where features are few; null for none.
        convolutions: reads larger maps than the head's features from the update of a convolution, of few images; null
            for none.
        statistics: undoes BatchNorm in train mode by the running statistics that the peers share; null for none.
        softness: of max pooling's gradient at the first and at the last step, geometric between, see `SoftPooling`;
            [0, 0] for the exact gradient.
    """

    def __init__(
        self,
        lr: float = 0.1,
        priors: list[Prior] | None = None,
        balance: float = 3.0,
        prior_limit: tuple[float, float] = (0.15, 0.005),
        betas: tuple[float, float] = (0.8, 0.85),
        subtract_own: bool = True,
        resimulations: int | None = None,
        chunk_size: int | None = None,
        checkpoint_every: int = 25,
        refinement: Refinement | None = None,
        guidance: DiffusionGuidance | None = None,
        rounds: RoundsReader | None = None,
        decoder: LearnedDecoder | None = None,
        convolutions: Convolutions | None = None,
        statistics: BatchStatistics | None = None,
        softness: tuple[float, float] = (0.5, 0.025),
    ) -> None:
        super().__init__(subtract_own, checkpoint_every)
        if resimulations is None:
            resimulations = refinement.resimulations if refinement else RESIMULATIONS
        wrong = not positive(lr, *prior_limit) or not non_negative(balance, *softness)
        if wrong or (chunk_size is not None and chunk_size < 1) or resimulations < 0:
            raise SettingError(
                "`model` needs lr > 0, prior_limit > 0, balance >= 0, softness >= 0, chunk_size >= 1 or null and "
                f"resimulations >= 0, but got lr={lr}, prior_limit={prior_limit}, balance={balance}, "
                f"softness={softness}, chunk_size={chunk_size}, resimulations={resimulations}."
            )
        self.automatic_optimization = False  # one backward pass a chunk, so that memory holds one graph
        self.lr = lr
        self.priors = [ChromaTotalVariation(weight=1.0)] if priors is None else priors
        self.balance = balance
        self.prior_limit = prior_limit
        self.softness = softness
        self.betas = betas
        self.resimulations = resimulations
        self.chunk_size = chunk_size
        self.refinement = refinement
        self.guidance = guidance
        self.rounds = rounds or SameImages()
        self.decoder = decoder
        self.convolutions = convolutions
        self.statistics = statistics

    @property
    def title(self) -> str:
        if type(self) is not FeatureInversion:  # an alias, which names its component
            return type(self).__name__
        components = self.refinement, self.guidance, self.decoder, self.convolutions, self.statistics
        parts = [type(part).__name__ for part in components if part]
        if not isinstance(self.rounds, SameImages):
            parts.append(type(self.rounds).__name__)
        return " + ".join([type(self).__name__, *parts])

    def requirements(self, processes: int) -> list[Requirement]:
        components = self.rounds, self.refinement, self.guidance, self.decoder, self.convolutions, self.statistics
        parts = [part for part in components if part]
        of_parts = [needed for part in parts for needed in part.requirements()]
        return [LinearHead(), TrainedHead(), ReadableDropout(), *of_parts]

    def least_memory(self, rounds: RoundsSummary) -> int:
        """The updates of all rounds, a model, and what the closed form makes of the head's first layer."""
        return (len(rounds.assumptions) + 1) * super().least_memory(rounds) + space_bytes(rounds.model.head[0].weight)

    def peak_memory(self, rounds: RoundsSummary, images: int) -> int:
        return peak_bytes(rounds, images, self.chunk_size or CPU_CHUNK)

    def prepare(self) -> None:
        seen, device = self.observed_rounds, self.trainer.strategy.root_device
        updates = [self.update_of(observed) for observed in seen]
        model, assumptions = seen[0].observation.build_model(shared=True), seen[0].assumptions
        self.steps = assumptions.local_steps
        if assumptions.batch_size and not assumptions.client_sizes and self.rounds.scaled_by_steps:
            rank_zero_warn(
                f"The peers train in batches of {assumptions.batch_size}, but the number of images of each peer is "
                "unknown, so one step an epoch is assumed. If they took k, the features come out k times too large. "
                "Give `knowledge.num_clients`."
            )
        drifting = len(seen) * self.steps > 1
        self.training_of_rounds = [full_batches(observed, device) for observed in seen] if drifting else []
        self.leakage, self.presence = self.rounds.read(
            [head_parameters(o.without_weight_decay(u), model) for o, u in zip(seen, updates, strict=True)],
            [head_parameters(observed.observation.before, model) for observed in seen],
            [training_knowledge(observed, observed.observation.build_model(shared=True)) for observed in seen],
            [observed.observation.round for observed in seen],
        )
        self._warn_of_mixed_images(model)
        read = self.leakage.defended is not None
        self.suspected = suspected_defenses(updates[0], seen[0].observation.before, assumptions, read)
        half_way = model_half_way([observed.observation for observed in seen], updates, self.steps)
        half_way = soften(self._known_better(half_way, updates[0]))
        self.embedder = (for_speed(half_way, device),)  # a tuple, so that it is no submodule
        shape = seen[0].observation.image_shape
        noise = self.leakage.uncertainty.clamp_max(MOST_NOISE).to(device) if self.leakage.noisy else None
        self.register_buffer("noise", noise)  # of the features, relative to their size; None if they are exact
        noise = 0.0 if noise is None else noise.median().item()
        ridge = FeatureDecoder(self.model, shape, noise) if FeatureDecoder.fits(self.model, shape) else None
        self.scale = 1.0 if self.shown else found_scale(self.leakage, self.model, ridge, self.steps)
        self._starter = (self._better_start(ridge, noise),)  # a tuple, so that it is no submodule
        grey = None
        if self._starter[0] is None:  # BatchNorm refuses a single image
            grey = self._embedded(torch.full((2, *shape), 0.5))[:1]
        self.register_buffer("grey", grey, persistent=False)  # (1, D) features of the start
        if self.scale != 1:
            self.leakage = replace(self.leakage, features=self.scale * self.leakage.features)
        self.register_buffer("features", self.leakage.features.clone())  # target: under the model half way
        self.register_buffer("seen", self.leakage.seen, persistent=False)
        weights = self.leakage.weights
        self.register_buffer("weights", None if weights is None else weights.clone())
        self.register_buffer("labels", self.leakage.labels)
        self.images = nn.Parameter(self._first_images())
        mixing = self.leakage.mixing  # then `images` are mixtures, and what is found are `unmixed` ones
        self.register_buffer("unmixing", None if mixing is None else torch.linalg.inv(mixing), persistent=False)
        self.register_buffer("best", self.images.detach().clone())
        self.register_buffer("best_loss", torch.full((len(self.labels),), torch.inf))
        if self.refinement and self.noise is not None:
            rank_zero_warn(
                "`model.refinement` has no effect: it would match the simulated training to the noise that the peers' "
                "known defence leaves on the update."
            )
        if self.refinement and self.shown:
            rank_zero_warn(
                "`model.refinement` has no effect: it corrects the head's features, in whose place "
                "`model.convolutions` reads maps."
            )
        if self.refinement:
            self.refinement.start(self.leakage.features, self.labels)
        if self.guidance:
            self.guidance.start(self.images.detach())
        self.inverts = True
        self.inverts = self._inversion_pays()
        known = self._known_photographs
        if known is not None:  # the same ones at each error
            self.controls = known.repeat(len(ERRORS), 1, 1, 1)
        else:
            self.controls = control_images(len(ERRORS), shape)

    def _known_better(self, model: ImageClassifier, update: Tensors) -> ImageClassifier:
        """The model under BatchNorm's statistics, and up to a map that replaces the features, as far as asked for."""
        observed, self.shown = self.observed_rounds[0], None
        normalised = frozenset(batch_statistics(model))
        if self.statistics and normalised:
            why = self.statistics.freeze(model, observed, self.leakage.diagnosis.num_images)
            if why:
                rank_zero_warn(f"`model.statistics` has no effect: {why}.")
        if self.convolutions:
            shape = observed.observation.image_shape
            gradients = observed.without_weight_decay(update)
            self.shown = self.convolutions.read(model, gradients, self.leakage, shape, normalised, self.steps)
        if self.shown:
            self.leakage = self.shown.instead(self.leakage)
            if self._together and self.ranks.count > 1:
                raise SettingError(
                    "Images of a peer pass through BatchNorm together, which several processes cannot divide. Set "
                    "`trainer.devices: 1`, or leave `model.convolutions` out."
                )
            return self.shown.model
        return model

    def _better_start(
        self, ridge: FeatureDecoder | None, noise: float
    ) -> FeatureDecoder | PhotographDecoder | PoolingPositions | None:
        """Of the decoders, the one that makes more of photographs that were held out."""
        if self.shown and self.shown.start:
            return self.shown.start
        if self.decoder is None:
            return ridge
        learned = self.decoder.fitted(self.model, self.observed_rounds[0].observation.image_shape, noise)
        features = self._embedded(learned.known)
        if ridge and mean_psnr(ridge(features), learned.known) > mean_psnr(learned(features), learned.known):
            return ridge
        return learned

    def _inversion_pays(self) -> bool:
        """Whether known photographs come out better if they are inverted, than as a learned decoder makes them.

        Where a model keeps few numbers of an image, very different images have the features, and the decoded one is
        nearer to the right one than that which a prior prefers.
        """
        start = self._starter[0]
        if isinstance(start, PoolingPositions):
            return False  # descent does not know the first convolution's gradient, and its positions are no better
        if not isinstance(start, PhotographDecoder) or self.guidance or self.noise is not None:
            return True
        known = start.known[:TRIED]
        features = self._embedded(known)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
            found = self.invert(features.clone(), max(self.trainer.max_steps, 1))
        return mean_psnr(found, known) > mean_psnr(start(features), known)

    @property
    def objective(self) -> Objective:
        """What the images minimise."""
        weights = self.priors, self.balance, self.prior_limit
        return Objective(self.model, *weights, self.softness, self.scale, self.grey)

    @property
    def _chunk(self) -> int:
        """Images that pass through the model at once; `Ranks.gather` takes fewer where memory does not suffice."""
        if self._together:
            return len(self.leakage.labels)
        return self.chunk_size or (CPU_CHUNK if self.device.type == "cpu" else len(self.features))

    @property
    def _together(self) -> bool:
        """Whether an image's features depend on the other images of its peer."""
        return self.shown is not None and self.shown.peers is not None

    @torch.no_grad()
    def _embedded(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D) features, a chunk at a time, of at least two images where there are as many."""
        chunks = images.to(self.model.mean).tensor_split(math.ceil(len(images) / max(self._chunk, 3)))
        return torch.cat([self.model.embed(chunk) for chunk in chunks])

    def _warn_of_mixed_images(self, model: ImageClassifier) -> None:
        found = self.leakage.diagnosis
        if found.disentangled < found.num_images:
            rank_zero_warn(
                f"Only {found.disentangled} of {found.num_images} images were disentangled: they share classes, and "
                "the activation patterns of the others were not found. The missing images are mixed into the features "
                "of some found ones, mostly of their class."
            )
        mixed = len(model.head) == 1 and not found.separated
        if mixed and len(self.leakage.labels.unique()) < len(self.leakage.labels):
            rank_zero_warn(
                "Several images share a class. A head of one layer shows only the sum of their features, so each of "
                "them comes out as their mean; images that are alone in their class are not affected."
            )

    def _first_images(self) -> Tensor:
        """(N, C, H, W) where the descent starts."""
        if self.shown and self.shown.start and self.shown.gradient:
            return self.shown.start(self.features.to(self.model.mean), self.shown.gradient)
        return self._start(self.features, self.seen)

    def _start(self, features: Tensor, seen: Tensor | None = None) -> Tensor:
        """(N, C, H, W) initial images for features (N, D), of which those that are not `seen` are unknown."""
        if self._starter[0]:
            if seen is not None:  # else the mean of the other images' that are
                mean = (features * seen).sum(0) / seen.sum(0).clamp_min(1)
                features = torch.where(seen, features, mean)
            return self._starter[0](features.to(self.model.mean))
        return self.model.mean.new_full((len(features), *self.observed_rounds[0].observation.image_shape), 0.5)

    @property
    def model(self) -> ImageClassifier:
        """The global model half way through the peers' training; of several rounds, the mean of these."""
        return self.embedder[0]

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        optimizer, scheduler = self._adam(self.images, max(self.trainer.max_steps, 1))
        return [optimizer], [scheduler]

    def _adam(self, images: Tensor, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.Adam([images], lr=self.lr, betas=self.betas, fused=True)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: FINAL_RATE ** (s / steps) ** FALL)

    def training_step(self, batch: int, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        self.images.grad = torch.zeros_like(self.images)
        if self._simulates_now:
            self._simulate_drift()
        if self._resolves_now:
            self._resolve()
        if self.guidance and self.guidance.denoises_at(self.global_step):
            self.guidance.denoise(self.images, self.ranks, self._chunk)
        scored = torch.empty(len(self.images), 2, device=self.device)
        last = self.global_step >= (1 - IN_FLOAT32) * self.trainer.max_steps
        with torch.autocast(self.device.type, enabled=False) if last else nullcontext():
            self.ranks.gather(scored, self._descend, self._chunk, divisible=not self._together)
        errors, losses = scored.unbind(1)
        self.join_gradients(self.images)
        self._remember(errors, losses)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            self.images.clamp_(0, 1)
        self.log("feature_error", errors.mean(), prog_bar=True)
        if self.refinement and self.refinement.best_residual.isfinite():
            self.log("unexplained_update", self.refinement.best_residual)
        if self.guidance and self.guidance.sigmas.isfinite().all():
            self.log("sigma", self.guidance.sigmas.mean())

    def _descend(self, chunk: Tensor) -> Tensor:
        """Set `images.grad` of the images `chunk` (n,); return (n, 2) their E, and the loss that ranks iterates."""
        if not self.inverts:
            with torch.no_grad():
                error = self._error_of(self.images[chunk], chunk)
            return torch.stack([error, error], 1)
        with torch.enable_grad():
            images = self.images.detach()[chunk].contiguous(memory_format=torch.channels_last).requires_grad_()
            noise, weights = (None if of is None else of[chunk] for of in (self.noise, self.counted))
            features, steps = self.features[chunk], self.trainer.max_steps
            loss, scored = self.objective.losses(images, features, self.global_step, steps, noise, weights)
            if self.guidance:
                loss = loss + self.guidance.penalty(images, chunk)
            self.back_propagate(loss.sum(), images)  # a sum: the images are independent
        self.images.grad[chunk] = images.grad
        return scored

    def invert(self, features: Tensor, steps: int, noise: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """(K, C, H, W) images from features (K, D), as in so many training steps without simulations and guidance.

        Args:
            features: of K images.
            steps: of the optimisation.
            noise: (K,) relative size of the noise in the features, see `Objective`.
            seen: (K, D) which of the features count; None for all.
        """
        images = self._start(features, seen).requires_grad_()
        if not self.inverts:
            return images.detach()
        best, best_loss = images.detach().clone(), images.new_full((len(images),), torch.inf)
        optimizer, scheduler = self._adam(images, steps)
        for step in range(steps):
            optimizer.zero_grad()
            loss, scored = self.objective.losses(
                images.contiguous(memory_format=torch.channels_last), features, step, steps, noise, seen
            )
            loss.sum().backward(inputs=[images])
            with torch.no_grad():
                better = scored[:, 1] < best_loss
                best[better], best_loss[better] = images[better], scored[better, 1]
                optimizer.step()
                scheduler.step()
                images.clamp_(0, 1)
        return best

    @property
    def _simulates_now(self) -> bool:
        """Whether the peers' training is simulated at this step."""
        every = math.ceil(max(self.trainer.max_steps, 1) / (self.resimulations + 1))
        return self._drifts and self.global_step > 0 and self.global_step % every == 0

    @property
    def _frozen(self) -> bool:
        """Whether features are the same in every round, as under a frozen backbone."""
        return self.leakage.diagnosis.separated

    @property
    def _drifts(self) -> bool:
        """Whether the features change during what was observed, and the training that changes them is as assumed."""
        several = len(self.observed_rounds) * self.steps > 1
        read = self.noise is None and not self._frozen and not self.shown
        return several and self.scale == 1 and read

    @property
    def _resolves_now(self) -> bool:
        """Whether a defended update is read once more at this step, with the images that were found so far."""
        if self.shown or not self.leakage.defended or not (times := self.leakage.defended.reading.resolves):
            return False
        every = math.ceil(max(self.trainer.max_steps, 1) / (times + 1))
        return self.global_step > 0 and self.global_step % every == 0

    @torch.no_grad()
    def _resolve(self) -> None:
        """Read a defended update once more, with the features of the best images so far as what is expected."""
        features = self._embedded(self.best).cpu()
        off = self.noise.cpu()  # images are no better than the features that they were made from
        found = self.leakage.defended.again(Expected(features / self.scale, off, of_images=True))
        self.features.copy_(self.scale * found.features)
        self.noise.copy_(found.uncertainty.clamp_max(MOST_NOISE))
        if found.weights is not None:
            self.weights.copy_(found.weights)
        self.best_loss.fill_(torch.inf)  # losses of another target are not comparable

    @torch.no_grad()
    def _simulate_drift(self) -> None:
        """Correct the target features by the simulated difference of their mean over the steps and half way."""
        rounds = self._simulate()
        means = self._mean_features(rounds)
        leaked = self.leakage.features.to(self.device)
        if self.refinement:
            first = self.model.first_layer
            observed = torch.cat([self.update_of(seen)[first].to(self.device) for seen in self.observed_rounds])
            leaked = self.refinement.refine(rounds, observed, means, self.global_step)
        drift = leaked - means

        def target(chunk: Tensor) -> Tensor:
            return drift[chunk] + self.model.embed(self.best[chunk].contiguous(memory_format=torch.channels_last))

        with torch.autocast(self.device.type, enabled=False):  # as the simulation, of which a difference is taken
            self.ranks.gather(self.features, target, self._chunk)
        self.best_loss.fill_(torch.inf)  # losses of another target are not comparable
        if not self.inverts:
            self.images.copy_(self._start(self.features, self.seen))

    def _simulate(self) -> list[SimulatedRound]:
        """The peers' training of all rounds on the best images so far, without images that a round does not show."""
        presence = self.presence.to(self.device)
        rounds = zip(self.training_of_rounds, presence, strict=True)
        return [self._simulate_round(training, shown) for training, shown in rounds]

    def _simulate_round(self, training: SimulatedPeers, shown: Tensor) -> SimulatedRound:
        """One round's training on the images `shown` (N,); each process takes a shard of the peers."""
        peers = self.leakage.peers.to(self.device)
        trained = peers[shown].unique()
        shard = trained[self.ranks.shard(len(trained)).to(self.device)]
        own = shown & torch.isin(peers, shard)
        name = training.model.first_layer
        first = training.parameters[name]
        features, errors = torch.zeros_like(self.features), first.new_zeros(len(peers), len(first))
        update = LowRank(first, 0.0, (errors[:0],), (features[:0],))
        if own.any():
            images = self.best[own].contiguous(memory_format=torch.channels_last)
            diagnosis = self.leakage.diagnosis
            count = int(shown.sum()) + diagnosis.num_images - diagnosis.disentangled
            with torch.autocast(self.device.type, enabled=False):  # small differences to the observed update count
                found = simulate_peers(training, images, self.labels[own], peers[own], count)
            features[own], errors[own], update = found.features, found.errors, found.update
        update = self.ranks.reduce_update({name: update})[name]
        return SimulatedRound(self.ranks.reduce(features), self.ranks.reduce(errors), update)

    def _mean_features(self, rounds: Sequence[SimulatedRound]) -> Tensor:
        """(N, D) mean of each image's simulated features over the rounds that show it."""
        total = torch.stack([round_.features for round_ in rounds]).sum(0)
        return total / self.presence.sum(0).to(total)[:, None]

    @property
    def counted(self) -> Tensor | None:
        """(N, D) weights of the features, see `feature_error`: not those that dropout hid; None for 1."""
        return self.seen if self.weights is None else self.weights

    def _error_of(self, images: Tensor, of: Tensor) -> Tensor:
        """(n,) `feature_error` of images, as those whose indices (n,) are `of`."""
        return self.feature_error(images, self.features[of], None if self.counted is None else self.counted[of])

    def feature_error(self, images: Tensor, features: Tensor, weights: Tensor | None = None) -> Tensor:
        """(N,) E of images, see `Objective.error`."""
        return self.objective.error(images, features, weights)

    @torch.no_grad()
    def misfit(self, images: Tensor, labels: Tensor) -> Tensor:
        """(N,) `|features(x) - f| / |f|`, which does not depend on the labels; the larger of two if it was mixed."""
        images, errors = images.to(self.device), self.features.new_empty(len(self.features))
        if self.unmixing is not None:
            mixing = self.leakage.mixing.to(images)
            images = torch.tensordot(mixing, images, 1)

        def error(chunk: Tensor) -> Tensor:
            return self._error_of(images[chunk], chunk)

        self.ranks.gather(errors, error, self._chunk, divisible=not self._together)
        if self.unmixing is not None:
            errors = ((mixing > 0) * errors[:, None]).amax(0)
        return errors.sqrt()

    @torch.no_grad()
    def _remember(self, errors: Tensor, losses: Tensor) -> None:
        """Keep each image's best iterate by its loss; with guidance the last, since its penalty changes on the way."""
        if self.guidance:
            self.best.copy_(self.images)
            self.guidance.errors.copy_(errors)
            return
        better = losses < self.best_loss
        self.best[better] = self.images[better]
        self.best_loss.copy_(torch.minimum(self.best_loss, losses))

    def reconstruction(self) -> Reconstruction:
        images, mixed = self.best.float(), self.unmixing is not None
        alone = not mixed and not self._together and not batch_statistics(self.model)
        if mixed:  # then, as of images that pass together, an error depends on another image as well
            images = torch.tensordot(self.unmixing, images, 1)

        return Reconstruction(
            images.clamp(0, 1),
            self.labels,
            num_classes=self.observed_rounds[0].observation.num_classes,
            consistency_error=None if mixed or self._together else self._error_of,
            peers=self.leakage.peers,
            features=self.leakage.features if alone else None,
            seen=self.leakage.seen if alone else None,
            embed=self.model.embed if alone else None,
        )

    def diagnosis(self) -> dict[str, Any]:
        found = self.leakage
        counts = Counter(found.labels.tolist())
        peers = len(found.peers.unique())
        return {
            **asdict(found.diagnosis),
            "scale": self.scale,
            "uncertainty": (found.uncertainty if self.noise is None else self.noise).median().item(),
            "peers": peers,
            "images_by_class": dict(sorted(counts.items())),
        }

    def _usual_misfit(self, returned: KnownImages) -> float:
        """Misfit that known images have as well, where images are not inverted beyond their start; else 0."""
        start = self._starter[0]
        if self.inverts or not isinstance(start, PhotographDecoder | PoolingPositions):
            return 0.0
        if isinstance(start, PoolingPositions):  # wrong positions make it, not wrong maps, and more of more contrast
            return UNLIKE * returned.misfit[0]
        features = self._embedded(start.known)
        return self.objective.distance(self._embedded(start(features)), features, None).amax().sqrt().item()

    def seconds_of_verdict(self) -> float:
        """By the first steps of the control images: they are fewer than the attack's own, or more.

        Those of another contrast count half, since only the others' end tells whether they are needed.
        """
        features = self._embedded(self.controls).clone()
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
            self.invert(features, 1)  # which warms up
            began = time.perf_counter()
            self.invert(features, TIMED)
        more = 0 if self._known_photographs is not None else STRETCHED / 2
        share = self.trainer.max_steps / TIMED if self.inverts else 1
        return (time.perf_counter() - began) * share * (1 + more / len(self.controls))

    @property
    def _known_photographs(self) -> Tensor | None:
        """(K, C, H, W) control images, where a decoder learned from photographs; else None, and dead leaves serve."""
        start = self._starter[0]
        return start.known[: TRIED if self.inverts else None] if isinstance(start, PhotographDecoder) else None

    def verdict(self, misfit: Tensor) -> Verdict:
        leakage = self.leakage if self.noise is None else replace(self.leakage, uncertainty=self.noise.cpu())
        steps = max(self.steps_taken, 1)
        controls, each = self.controls, len(self.controls) // len(ERRORS)
        noise = None if self.noise is None else torch.tensor(ERRORS, device=self.device).repeat_interleave(each)
        seen = None if self.seen is None else self.seen[torch.arange(len(controls)) % len(self.seen)]

        def invert(features: Tensor) -> Tensor:
            of = (None if part is None else part[: len(features)] for part in (noise, seen))
            return self.invert(features, steps, *of)

        def error(images: Tensor, features: Tensor) -> Tensor:
            return self.feature_error(images, features, seen)

        flat, gain = mean_colour_psnr(controls[:each]), -math.inf
        with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
            returned = known_images(self.features.clone(), self.model, invert, error, controls)
            misfit = (misfit.cpu() - self._usual_misfit(returned)).clamp_min(0)
            evidence = Evidence(leakage, self.features.cpu(), misfit, self._drifts, self.scale)
            *psnr, best = returned.psnr_at([*evidence.errors.tolist(), 0.0])
            usual = torch.tensor(returned.misfit_at(evidence.leaked_errors.tolist()))
            if self._known_photographs is None and best - flat < LEAST_GAIN[Level.NOT_READ]:
                gain = gain_of_contrast(self.best.float().cpu(), self.model, invert, flat)
        if self.unmixing is not None:  # as if the images that are added up were wrong independently
            wrong = self.unmixing.cpu().square() @ 10 ** (-torch.tensor(psnr) / 10)
            psnr = (-10 * wrong.log10()).tolist()
        verdict = judge(evidence, psnr, best, self.model, flat, gain, usual)
        if self.shown:
            verdict = self.shown.limited(verdict, misfit, controls[0].numel())
        return qualified(verdict, self.suspected, self.observed_rounds[0].assumptions, self.unmixing is not None)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {FORMER_KEYS.get(name, name): tensor for name, tensor in state.items()}

    def introduction(self) -> str:
        distinct = len(self.labels.unique()) > len(self.labels) / 2  # images that share their class are not refined
        refinable = not self.refinement and self.observed_rounds[0].assumptions.in_full_batches and distinct
        components = self.rounds, self.refinement, self.guidance, self.shown
        start = of_start(self._starter[0], self.inverts)
        lines = [
            of_closed_form(self.leakage, self.observed_rounds),
            f"Feature inversion: {self.images[0].numel():,} pixels an image from {self.features.shape[1]:,} features, "
            f"Adam at rate {self.lr:g}, {self.trainer.max_steps} steps from {start}.",
            of_defence(self.leakage, once=self.shown is not None),
            *(part.introduction() for part in components if part),
            REFINE if self.leakage.diagnosis.drift > DRIFTING and refinable else "",
        ]
        return "\n".join(filter(None, lines))
