"""Closed-form leakage, then each image alone from its own features."""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from attack_modules.analytic.leak import leak_rounds
from attack_modules.analytic.results import Leakage, TrainingKnowledge
from attack_modules.attack import Attack, Reconstruction
from attack_modules.feature_inversion.decoder import FeatureDecoder
from attack_modules.feature_inversion.drift import SimulatedRound, full_batches, simulate_peers
from attack_modules.priors import ChromaTotalVariation, Prior, annealed
from attack_modules.simulation.feature_map import for_speed
from attack_modules.simulation.half_way import model_half_way
from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.simulation.low_rank import LowRank
from fl_lightning.client import Tensors
from fl_lightning.errors import SettingError
from fl_lightning.knowledge import Beliefs
from fl_lightning.models import FIRST_LAYER, ImageClassifier, ImageShape

LEAST_ERROR = 1e-10
"""E below which nothing is gained: float32 shows no less."""
LEAST_PRIOR = 1 / 255
"""The same of P: total variation of a grey level. Without it, a flat image would be the best of all."""
LAST_RATE = 0.03
"""Share of the rate that is left at the end. It falls like a Gaussian: high for long, then small but never nothing."""

DRIFTING = 0.03
"""Drift of the activations from which on refinement surely pays: 3 dB or more above 8 %, 1 or none below 2 %."""
REFINE = (
    "\nThe local training changes the model much, as the drift shows: `RefinedInversion` (configs/refined.yaml) would "
    "make better images of it."
)


class FeatureInversion(Attack):
    """Images whose features are those that linear algebra reads from the head's update; its parameters ARE the images.

    The head's part of the peers' update gives every image's features (`analytic.leak`), so that what is left
    is N separate problems: Adam on the error `E = |features(x) - f|^2 / |f|^2` plus priors P, with one forward and one
    backward pass of the convolutional part a step. `trainer.max_steps` is the number of steps. It begins with the
    images that a linear regression finds in the features (`FeatureDecoder`), or with grey ones where these are no map.

    E falls by four orders of magnitude, with one image and model further than with another, and a weight of P that fits
    the beginning smooths the end away. So what is descended, image by image, is `log E + balance * log P`: both count
    by their relative changes, from first to last. Where E stays high because no image has these features, P would come
    to count too much: its weight beside E, `balance * E / P`, stays below a falling limit.

    Several observed rounds are read together (`leak_rounds`): the same peers must have trained on the same images.

    Features leak as their mean over the peers' local steps, which is nearly that of the model half way. The rest of
    the difference is simulated now and then from the images so far, peer by peer (`simulate_peers`).

    Args:
        lr: the attacker's own learning rate at the start, of Adam on the pixels.
        priors: penalties, P in sum; null for `ChromaTotalVariation`.
        balance: how many times the relative change of E that of P counts.
        prior_limit: the most that P may weigh beside E at the first and at the last step, geometric between.
        betas: of Adam. Deep models want longer memories: (0.9, 0.99) makes one dB more of ResNet9, two less of LeNet5.
        subtract_own: take the attacker's own update out of the aggregate first.
        resimulations: times, spread evenly over the steps, at which the peers' training is simulated; 0 for never.
        chunk_size: images that are passed through the model at once, which bounds memory.
        checkpoint_every: steps between checkpoints.
    """

    def __init__(
        self,
        lr: float = 0.13,
        priors: list[Prior] | None = None,
        balance: float = 3.0,
        prior_limit: tuple[float, float] = (0.3, 0.01),
        betas: tuple[float, float] = (0.7, 0.9),
        subtract_own: bool = True,
        resimulations: int = 2,
        chunk_size: int = 16,
        checkpoint_every: int = 25,
    ) -> None:
        super().__init__(subtract_own, checkpoint_every)
        if min(lr, *prior_limit) <= 0 or balance < 0 or chunk_size < 1 or resimulations < 0:
            raise SettingError(
                "`model` needs lr > 0, prior_limit > 0, balance >= 0, chunk_size >= 1 and resimulations >= 0, but got "
                f"lr={lr}, prior_limit={prior_limit}, balance={balance}, chunk_size={chunk_size}, "
                f"resimulations={resimulations}."
            )
        self.automatic_optimization = False  # one backward pass a chunk, so that memory holds one graph
        self.lr = lr
        self.priors = [ChromaTotalVariation(weight=1.0)] if priors is None else priors
        self.balance = balance
        self.prior_limit = prior_limit
        self.betas = betas
        self.resimulations = resimulations
        self.chunk_size = chunk_size

    def configure_model(self) -> None:
        if hasattr(self, "images"):
            return
        observation = self.observations[0]
        device = self.trainer.strategy.root_device
        updates = [self.update_of(observation) for observation in self.observations]
        model = observation.build_model()
        beliefs, self.steps = observation.beliefs, observation.beliefs.local_steps
        if beliefs.batch_size and not beliefs.client_sizes:
            rank_zero_warn(
                f"The peers train in batches of {beliefs.batch_size}, but how many images each of them holds is not "
                f"believed, so that one step an epoch is taken for granted. If they took k, the features come out k "
                "times too large. Give `knowledge.num_clients`."
            )
        self.training_of_rounds = [full_batches(observation, device) for observation in self.observations]
        self.leakage, self.presence = self.leak(
            [_head(o.without_weight_decay(u), model) for o, u in zip(self.observations, updates, strict=True)],
            [_head(o.before, model) for o in self.observations],
            [_training(o.beliefs) for o in self.observations],
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
        half_way = for_speed(model_half_way(self.observations, updates, self.steps), device)
        self.embedder = (half_way,)  # no submodule
        self.register_buffer("features", self.leakage.features.clone())  # those of the model half way
        self.register_buffer("labels", self.leakage.labels)
        self.images = nn.Parameter(self._beginning(observation.image_shape))
        self.register_buffer("best", self.images.detach().clone())
        self.register_buffer("best_loss", torch.full((len(self.labels),), torch.inf))

    def _beginning(self, image_shape: ImageShape) -> Tensor:
        """(N, C, H, W) images to begin with."""
        if FeatureDecoder.fits(self.model, image_shape):
            return FeatureDecoder(self.model, image_shape)(self.features.to(self.model.mean))
        return torch.full((len(self.features), *image_shape), 0.5)

    def leak(
        self, updates: Sequence[Tensors], weights: Sequence[Tensors], beliefs: Sequence[TrainingKnowledge]
    ) -> tuple[Leakage, Tensor]:
        """What the head's updates say of the images, and (rounds, N) bool which rounds show which: here all show all.

        Args:
            updates: of each observed round, as in `leak_rounds`.
            weights: of each round, as there.
            beliefs: how the peers trained, of each round.
        """
        leakage = leak_rounds(updates, weights, beliefs[0])
        return leakage, torch.ones(len(updates), len(leakage.labels), dtype=torch.bool)

    @property
    def model(self) -> ImageClassifier:
        """The global model half way through the peers' training; of several rounds, the mean of these."""
        return self.embedder[0]

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        optimizer = torch.optim.Adam([self.images], lr=self.lr, betas=self.betas, fused=True)
        steps = max(self.trainer.max_steps, 1)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: LAST_RATE ** (s / steps) ** 2)]

    def training_step(self, batch: int, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        self.images.grad = torch.zeros_like(self.images)
        if (
            len(self.observations) * self.steps > 1
            and self.global_step
            and self.global_step % self._simulate_every == 0
        ):
            self._resimulate()
        most = annealed(self.prior_limit, self.global_step, self.trainer.max_steps)

        def scores(chunk: Tensor) -> Tensor:  # (n, 2): error, and what the best iterate is judged by
            with torch.enable_grad():
                images = self.images.detach()[chunk].contiguous(memory_format=torch.channels_last).requires_grad_()
                error = self.feature_error(images, self.features[chunk])
                prior = sum((prior.weight * prior(images) for prior in self.priors), torch.zeros_like(error))
                scale = error.detach() + LEAST_ERROR
                tiny = torch.finfo(prior.dtype).tiny  # a flat image has no variation to compare with
                weight = (self.balance * scale / prior.detach().clamp_min(tiny)).clamp(max=most)
                loss = (error + weight * prior) / scale + self.guidance(images, chunk)
                self.back_propagate(loss.sum(), images)  # a sum: no image feels another
            self.images.grad[chunk] = images.grad
            return torch.stack([error, scale.log() + self.balance * (prior + LEAST_PRIOR).log()], 1)

        scored = torch.empty(len(self.images), 2, device=self.device)
        self.ranks.gather(scored, scores, self.chunk_size)
        self.join_gradients(self.images)
        self._remember(*scored.unbind(1))
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            self.images.clamp_(0, 1)
        self.log("feature_error", scored[:, 0].mean(), prog_bar=True)

    @property
    def _simulate_every(self) -> int:
        return math.ceil(max(self.trainer.max_steps, 1) / (self.resimulations + 1))

    @torch.no_grad()
    def _resimulate(self) -> None:
        """Take from the leaked features what the local steps add to those of the model half way, by the best images."""
        drift = self.leaked_features(rounds := self._simulate()) - self._mean_features(rounds)

        def half_way(chunk: Tensor) -> Tensor:
            return drift[chunk] + self.model.embed(self.best[chunk].contiguous(memory_format=torch.channels_last))

        self.ranks.gather(self.features, half_way, self.chunk_size)
        self.best_loss.fill_(torch.inf)  # of another target

    def _simulate(self) -> list[SimulatedRound]:
        """The peers' training of all rounds on the best images so far; an image has no part in a round without it."""
        presence = self.presence.to(self.device)
        rounds = zip(self.training_of_rounds, presence, strict=True)
        return [self._simulate_round(training, shown) for training, shown in rounds]

    def _simulate_round(self, training: SimulatedPeers, shown: Tensor) -> SimulatedRound:
        """One round's training on the images `shown` (N,); each process takes a part of the peers."""
        peers = self.leakage.peers.to(self.device)
        trained = peers[shown].unique()
        own = shown & torch.isin(
            peers, trained[self.ranks.shard(len(trained)).to(self.device)]
        )  # images of whole peers
        first = training.parameters[FIRST_LAYER]
        features, errors = torch.zeros_like(self.features), first.new_zeros(len(peers), len(first))
        update = LowRank(first, 0.0, (errors[:0],), (features[:0],))
        if own.any():
            images = self.best[own].contiguous(memory_format=torch.channels_last)
            count = int(shown.sum()) + self.leakage.diagnosis.num_images - self.leakage.diagnosis.separated
            with torch.autocast(self.device.type, enabled=False):  # it is the difference to the observed that counts
                found = simulate_peers(training, images, self.labels[own], peers[own], count)
            features[own], errors[own], update = found.features, found.errors, found.update
        update = self.ranks.reduce_update({FIRST_LAYER: update})[FIRST_LAYER]
        return SimulatedRound(self.ranks.reduce(features), self.ranks.reduce(errors), update)

    def leaked_features(self, rounds: list[SimulatedRound]) -> Tensor:
        """(N, D) mean over the local steps of the images' features, as they leaked.

        Args:
            rounds: the observed rounds, simulated on the best images so far.
        """
        return self.leakage.features.to(self.device)

    def _mean_features(self, rounds: list[SimulatedRound]) -> Tensor:
        """(N, D) mean of each image's simulated features over the rounds that show it."""
        total = torch.stack([round_.features for round_ in rounds]).sum(0)
        return total / self.presence.sum(0).to(total)[:, None]

    def feature_error(self, images: Tensor, features: Tensor) -> Tensor:
        """(N,) relative squared distance of the images' features (N, D) to those that leaked."""
        return (self.model.embed(images) - features).square().sum(1) / features.square().sum(1)

    def guidance(self, images: Tensor, chunk: Tensor) -> Tensor:
        """(N,) what else is added to log E + balance * log P of the images numbered `chunk` (N,); here nothing."""
        return images.new_zeros(len(images))

    @torch.no_grad()
    def misfit(self, images: Tensor, labels: Tensor) -> Tensor:
        """(N,) `|features(x) - f| / |f|`, which the labels do not enter."""
        images, errors = images.to(self.device), self.features.new_empty(len(self.features))
        self.ranks.gather(
            errors, lambda chunk: self.feature_error(images[chunk], self.features[chunk]), self.chunk_size
        )
        return errors.sqrt()

    @torch.no_grad()
    def _remember(self, errors: Tensor, losses: Tensor) -> None:
        """Keep every image's best iterate, judged by `losses`."""
        better = losses < self.best_loss
        self.best[better] = self.images[better]
        self.best_loss.copy_(torch.minimum(self.best_loss, losses))

    def reconstruction(self) -> Reconstruction:
        images = self.best.float().clamp(0, 1)
        num_classes = self.observations[0].num_classes
        return Reconstruction(
            images, self.labels, num_classes=num_classes, disagreement=self._disagreement, peers=self.leakage.peers
        )

    def _disagreement(self, images: Tensor, indices: Tensor) -> Tensor:
        """See `Reconstruction.disagreement`: the relative error of the features that leaked."""
        return self.feature_error(images, self.features[indices])

    def introduction(self) -> str:
        found, observation = self.leakage.diagnosis, self.observations[0]
        several = len(self.observations) > 1
        subject = f"updates of {len(self.observations)} rounds hold" if several else "update holds"
        decoded = FeatureDecoder.fits(self.model, self.images.shape[1:])
        beginning = "images that a regression decodes" if decoded else "grey ones, since the features are no map"
        unknown = self.images[0].numel()
        distinct = len(self.labels.unique()) > len(self.labels) / 2  # images that share their class are not refined
        refinable = observation.beliefs.in_full_batches and distinct
        advice = REFINE if found.drift > DRIFTING and refinable and type(self) is FeatureInversion else ""
        return (
            f"Attack: closed-form leakage. The head's {subject} {found.num_images} images, {found.separated} told "
            f"apart (singular value gap {found.gap:.3g}, residual {found.residual:.2%}, condition number "
            f"{found.conditioning:.3g}, drift {found.drift:.2%}, outside {found.outside:.2%}), trained by "
            f"{len(self.leakage.peers.unique())} peer(s) as far as it shows; labels "
            f"{observation.sources['labels']}.\n"
            f"From {self.features.shape[1]:,} features each, {unknown:,} unknown numbers an image are found by Adam at "
            f"rate {self.lr:g} for {self.trainer.max_steps} steps from {beginning}.{advice}"
        )


def _head(state: Tensors, model: ImageClassifier) -> Tensors:
    """The parameters of the head, in the order of its layers; a saved Observation has them in that of their names."""
    return {name: state[name] for name, _ in model.named_parameters() if name.startswith("head.")}


def _training(beliefs: Beliefs) -> TrainingKnowledge:
    """What the closed form needs to know of a round's training."""
    labels = None if beliefs.labels is None else torch.tensor(beliefs.labels)
    return TrainingKnowledge(beliefs.mean_rate, beliefs.local_steps, beliefs.num_images, labels, beliefs.local_epochs)
