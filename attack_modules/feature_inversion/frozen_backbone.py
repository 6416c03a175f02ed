"""Rounds of one linear layer over a frozen backbone, read together.

By the features' zeros (`analytic.sparse_rounds`), by each image's errors (`error_series`), or for all (`joint_rounds`).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.analytic.drifting_peers import DriftingPeers, HeadSteps, drifting_peers
from attack_modules.analytic.error_series import EQUATIONS, error_series
from attack_modules.analytic.fewer_images import fewer_images
from attack_modules.analytic.hidden_labels import hidden_labels
from attack_modules.analytic.joint_rounds import DIRECT, JointSolution, LocalSteps, solve_rounds
from attack_modules.analytic.results import Diagnosis, Leakage, TrainingKnowledge
from attack_modules.analytic.row_space import augmented
from attack_modules.analytic.sparse_rounds import sparse_rounds
from attack_modules.analytic.stacked_rounds import FoundImages, StackedRounds
from attack_modules.attack import AttackError
from attack_modules.feature_inversion.rounds import RoundsReader, refuse_other_images
from attack_modules.threat_model.observed import RoundsSummary
from attack_modules.threat_model.requirements import Requirement
from fl_lightning.client import Tensors
from fl_lightning.errors import SettingError, counted

MOST = 100
"""Images that are solved for together, without zeros: 64 take two to four minutes of a core for each start."""
SHARE = 0.2
"""Images for each feature up to which zeros are looked for first. Half of the features of EfficientNet are zeros of an
image: 256 images in 1280 are found, and of 512, a quarter has fewer zeros than there are images."""


class HeadAlone(Requirement):
    """Peers who train a head whose first layer has a bias, and nothing else."""

    name = "rounds in which peers train nothing but a head of linear layers with biases"

    def violation(self, rounds: RoundsSummary) -> str | None:
        name, trained = type(rounds.model).__name__, {n for n, p in rounds.model.named_parameters() if p.requires_grad}
        layers = [layer for layer in rounds.model.head if isinstance(layer, nn.Linear)]
        if any(layer.bias is None for layer in layers):
            return f"{name} has a head without biases. Choose another `federation.model`, or `model.rounds`."
        if others := sorted(trained - set(rounds.model.head_parameters)):
            return (
                f"they train {others[0]} of {name} too, so features change from round to round. Set "
                "`federation.trainable: head`, or name one round and leave `model.rounds` out."
            )
        return None


class PlainSGD(Requirement):
    """Any SGD: its steps add up images' features."""

    name = "peers who train by SGD"

    def violation(self, rounds: RoundsSummary) -> str | None:
        for known in rounds.assumptions:
            if known.optimizer != "SGD":
                return (
                    f"they train by {known.optimizer}, which scales each entry of the update by itself, so that it is "
                    "no sum of features. Set `federation.client.optimizer: SGD`, or attack one round."
                )
        return None


class FrozenBackbone(RoundsReader):
    """Peers train a head of linear layers over a frozen backbone; all observed rounds are read together.

    Images that share classes come out too. Neither labels nor their counts nor the number of images need to be told,
    and told ones are not used to find the features. Where the backbone ends in a ReLU, the zeros of the features show
    them, however the peers train and whoever takes part (`analytic.sparse_rounds`), and several full-batch local steps
    show who trained together (`analytic.drifting_peers`). In one full-batch step of the same clients, the errors of
    each image show it, too (`analytic.error_series`), if rounds times classes are more than twice the images; this is
    tried first for more than a fifth as many images as features. Where neither shows half of the images, the rounds
    are solved for all of them (`analytic.joint_rounds`): of full batches of the same clients, in one local step, or in
    several of a single peer. Heads of several layers are read by zeros alone; of one full-batch step, errors prove each
    image, which is then taken out, so that zeros need only outnumber those that are left (`analytic.fewer_images`). The
    rounds must suffice to show the number of images.

    Args:
        starts: most random starts of the joint solver, of which the residual chooses.
        iterations: most of each start.
        seed: of the starts, there and for the errors of single images.

    Raises:
        SettingError: a number is below 1.
    """

    scaled_by_steps = False  # the 1 of the bias shows the scale
    solution: FoundImages | JointSolution
    """Of the rounds that were read last, as is the next."""
    drifting: DriftingPeers | None
    """Who trained together, as local steps show; None where there are none to see, or not all images were found."""

    def __init__(self, starts: int = 6, iterations: int = 200, seed: int = 0) -> None:
        if starts < 1 or iterations < 1:
            raise SettingError(
                f"`model.rounds` needs starts >= 1 and iterations >= 1, but got starts={starts} and "
                f"iterations={iterations}."
            )
        self.starts = starts
        self.iterations = iterations
        self.seed = seed

    def requirements(self) -> list[Requirement]:
        return [HeadAlone(), PlainSGD()]

    def read(
        self,
        updates: Sequence[Tensors],
        weights: Sequence[Tensors],
        training: Sequence[TrainingKnowledge],
        numbers: Sequence[int],
    ) -> tuple[Leakage, Tensor]:
        known = training[0]
        if known.reading:
            rank_zero_warn(
                "The peers' defence is known, but rounds of a frozen backbone are read as if there were none."
            )
        gradients = [augmented(u)[0].double() / t.lr for u, t in zip(updates, training, strict=True)]
        layers = [augmented(w) for w in weights]
        before, deep = torch.stack([first for first, *_ in layers]), len(layers[0]) > 1
        rounds = StackedRounds.of(before, torch.stack(gradients), True)
        if deep:
            found = under_several_layers(rounds, torch.stack(gradients), layers, training)
            refuse_few_zeros(found, numbers)
            self.solution, presence, self.drifting = found, found.presence, None
        elif 2 * len((found := self._one_by_one(rounds, training)).labels) >= rounds.num_images:
            self.solution, presence = found, found.presence
            self.drifting = peers_of(found, before, torch.stack(gradients), known)
        else:
            self.solution = self._joint(rounds, training, numbers, len(found.labels))
            presence = torch.ones(len(updates), rounds.num_images, dtype=torch.bool)
            self.drifting = None
        found = self.solution
        diagnosis = Diagnosis(
            num_images=rounds.num_images,
            held=len(found.labels.unique()),
            shown=rounds.num_images,
            disentangled=len(found.labels),
            gap=rounds.gap,
            residual=rounds.noise * rounds.gradients.numel() ** 0.5 / rounds.gradients.norm().item(),
            conditioning=(rounds.singular[0] / rounds.singular[-1]).item(),
            drift=0.0,
            outside=0.0,
            separated=True,
        )
        patterns = presence.unique(dim=1, return_inverse=True)[1]
        peers = self.drifting.peers if self.drifting and self.drifting.explained else patterns
        leakage = Leakage(found.labels, found.features.float(), peers, diagnosis, found.expected_errors.float())
        return leakage, presence

    def _one_by_one(self, rounds: StackedRounds, training: Sequence[TrainingKnowledge]) -> FoundImages:
        """By zeros or by errors, whichever shows more images; the second is not tried where the first shows all."""
        known, (number, classes, size) = training[0], rounds.weights.shape
        enough = number * (classes - 1) > EQUATIONS * size
        if not (single_steps(training) and enough and size > DIRECT):
            return sparse_rounds(rounds)

        readings = [lambda: error_series(rounds, known.loss.label_smoothing, self.seed), lambda: sparse_rounds(rounds)]
        first, second = readings if size > SHARE * rounds.basis.shape[1] else readings[::-1]
        best = first()
        return best if len(best.labels) == size else max(best, second(), key=lambda found: len(found.labels))

    def _joint(
        self, rounds: StackedRounds, training: Sequence[TrainingKnowledge], numbers: Sequence[int], shown: int
    ) -> JointSolution:
        """By `joint_rounds`, where zeros showed too few images."""
        known, images = training[0], counted(rounds.num_images, "image")
        batches = known.epochs is not None and known.epochs < known.steps
        if batches or known.loss.class_weights is not None:
            raise AttackError(
                f"Zeros and errors show {shown} of {images} in rounds {numbers[0]} to {numbers[-1]}, so the "
                f"backbone may not end in a ReLU. Without them, {'mini-batches' if batches else 'class weights'} are "
                "not solved. Observe more rounds (`federation.observed_rounds`), or attack one round."
            )
        if rounds.num_images > MOST:
            raise AttackError(
                f"Zeros and errors show {shown} of {images} in rounds {numbers[0]} to {numbers[-1]}, so the "
                f"backbone may not end in a ReLU, or augmentation shows each image in another view in each round. "
                f"Without zeros, at most {MOST} images are solved. Observe fewer clients, or attack one round."
            )
        refuse_other_images(training, numbers)
        labels = None if known.labels is None or len(known.labels) != rounds.num_images else known.labels.sort().values
        steps = LocalSteps(known.steps, known.lr)
        found = solve_rounds(
            rounds, labels, known.loss.label_smoothing, steps, self.starts, self.iterations, seed=self.seed
        )
        if not found.explained:
            raise AttackError(
                f"Zeros and errors show {shown} of {images} in rounds {numbers[0]} to {numbers[-1]}, and solved "
                f"for all, they leave {found.residual:.3g} times the noise in the best of "
                f"{counted(len(found.tried), 'start')}. The peers may have trained otherwise, or changed. Otherwise "
                "observe more rounds, or raise `model.rounds.starts` or `iterations`."
            )
        return found

    def introduction(self) -> str:
        found = self.solution
        if isinstance(found, FoundImages):
            how = f"by the {found.evidence}"
        else:
            how = f"by start {len(found.tried)} of {self.starts}, which leaves {found.residual:.3g} times the noise"
        return (
            f"Rounds of a frozen backbone: {counted(len(found.labels), 'image')} found {how}; the features of "
            f"{int(found.certified.sum())} are certified. They are off by {found.expected_errors.median():.2g}, at "
            f"most {found.expected_errors.max():.2g}. {self._peers_found()}"
        )

    def _peers_found(self) -> str:
        patterns = 1 if isinstance(self.solution, JointSolution) else len(self.solution.presence.unique(dim=1).T)
        shown = f"Participation shows {counted(patterns, 'peer')}, and does not tell others apart"
        if self.drifting is None:
            return f"{shown}, since no several full-batch steps of all images are seen."
        peers = counted(int(self.drifting.peers.max()) + 1, "peer")
        left = f"{self.drifting.residual:.1%} of what the steps change unexplained."
        if self.drifting.explained:
            return f"Their local steps show {peers}, which leave {left}"
        return f"{shown}: {peers}, which fit full-batch steps best, leave {left}"


def single_steps(training: Sequence[TrainingKnowledge]) -> bool:
    """Whether an image leaves the errors of its own logits: one full-batch step of the same images in each round."""
    known = training[0]
    alike = all((t.num_images, t.steps, t.epochs) == (known.num_images, 1, known.epochs) for t in training)
    return alike and known.epochs in (None, 1) and known.loss.class_weights is None


def under_several_layers(
    rounds: StackedRounds,
    gradients: Tensor,
    layers: Sequence[Sequence[Tensor]],
    training: Sequence[TrainingKnowledge],
) -> FoundImages:
    """By zeros, of fewer and fewer images where errors prove them.

    Args:
        rounds: of the first layer.
        gradients: (R, H, D + 1) of it.
        layers: of each round, (out, in + 1) weights of each layer before it.
        training: in each round.
    """
    proved = fewer_images(rounds, layers, training[0].loss.label_smoothing) if single_steps(training) else None
    if proved is not None and len(proved.labels) == rounds.num_images:
        return proved
    shown = sparse_rounds(rounds)
    if proved is not None and len(proved.labels) >= len(shown.labels):
        return proved
    return replace(shown, labels=hidden_labels(shown.features, gradients, layers))


def refuse_few_zeros(found: FoundImages, numbers: Sequence[int]) -> None:
    """Refuse to go on with less than half of the images, where there is nothing but zeros to find them by.

    Args:
        found: the images.
        numbers: of the rounds.

    Raises:
        AttackError: with the numbers of images.
    """
    if 2 * len(found.labels) < found.num_images:
        raise AttackError(
            f"Zeros of the features show {len(found.labels)} of {counted(found.num_images, 'image')} in rounds "
            f"{numbers[0]} to {numbers[-1]} of a head of several layers. An image needs more features that are 0 than "
            "there are images, as behind a ReLU. Observe fewer clients, or name one round and leave `model.rounds` out."
        )


def peers_of(found: FoundImages, weights: Tensor, gradients: Tensor, known: TrainingKnowledge) -> DriftingPeers | None:
    """Who trained together, where several full-batch steps can be simulated of all images.

    Args:
        found: the images.
        weights: (R, C, D + 1) before each round.
        gradients: (R, C, D + 1) of the mean loss, summed over the steps.
        known: of the training.
    """
    inputs = torch.cat([found.features, torch.ones(len(found.labels), 1)], 1)
    if known.steps == 1 or known.epochs != known.steps or known.loss.class_weights is not None:
        return None
    if len(inputs) < max(found.num_images, 2):
        return None
    smoothing, classes = known.loss.label_smoothing, weights.shape[1]
    targets = F.one_hot(found.labels, classes).double().T * (1 - smoothing) + smoothing / classes
    errors = gradients @ torch.linalg.pinv(inputs) * found.presence.sum(1)[:, None, None]
    steps = HeadSteps(weights.double() @ inputs.T, inputs @ inputs.T, targets, found.presence, known.lr, known.steps)
    return drifting_peers(steps, errors)
