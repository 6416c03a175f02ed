"""Rounds of one linear layer over a frozen backbone, solved together: `analytic.joint_rounds`."""

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from attack_modules.analytic.joint_rounds import JointSolution, LocalSteps, StackedRounds, solve_rounds
from attack_modules.analytic.results import Diagnosis, Leakage, TrainingKnowledge
from attack_modules.analytic.row_space import augmented
from attack_modules.attack import AttackError
from attack_modules.feature_inversion.rounds import RoundsReader, refuse_other_images
from attack_modules.threat_model.observed import RoundsSummary
from attack_modules.threat_model.requirements import Requirement, SameClients
from fl_lightning.client import Tensors
from fl_lightning.errors import SettingError, counted


class HeadAlone(Requirement):
    """Peers who train one linear layer with a bias, and nothing else."""

    name = "rounds in which peers train nothing but one linear layer with a bias"

    def violation(self, rounds: RoundsSummary) -> str | None:
        name, trained = type(rounds.model).__name__, {n for n, p in rounds.model.named_parameters() if p.requires_grad}
        layers = [layer for layer in rounds.model.head if isinstance(layer, nn.Linear)]
        if len(layers) != 1 or layers[0].bias is None:
            return f"{name} has {len(layers)} layers, or no bias. Choose another `federation.model`, or `model.rounds`."
        if others := sorted(trained - set(rounds.model.head_parameters)):
            return (
                f"they train {others[0]} of {name} too, so features change from round to round. Set "
                "`federation.trainable: head`, or name one round and leave `model.rounds` out."
            )
        return None


class FullBatches(Requirement):
    """Plain SGD on full batches, without class weights: one step, or several of a single peer."""

    name = "plain SGD on full batches in each round, and of several peers one local step"

    def violation(self, rounds: RoundsSummary) -> str | None:
        for known in rounds.assumptions:
            if not known.in_full_batches or known.optimizer != "SGD" or known.class_weights is not None:
                return (
                    f"the peers train in batches of {known.batch_size or 'all images'} by {known.optimizer}, or weigh "
                    "classes. Set `federation.client.batch_size: null`, `optimizer: SGD` and `class_weights: null`, or "
                    "attack one round."
                )
            if known.local_steps > 1 and (known.momentum or known.weight_decay or (known.num_clients or 1) > 1):
                return (
                    f"{counted(known.num_clients or 1, 'peer')} of momentum {known.momentum} and weight decay "
                    f"{known.weight_decay} take {known.local_steps} steps each. Set `federation.client.local_epochs: "
                    "1`, or `data.num_clients: 2`, `momentum: 0` and `weight_decay: 0`, or attack one round."
                )
        return None


class FrozenBackbone(RoundsReader):
    """The same peers train a linear head over a frozen backbone in every observed round; all are solved together.

    Images that share classes come out too. Neither labels nor their counts nor the number of images need to be told.
    Where rounds have several local steps, all images are taken to be those of one peer, which moves with them.
    About as many rounds are needed as give twice as many equations, rounds times classes less one, as there are images.

    Args:
        starts: most random starts of the solver, of which the residual chooses.
        iterations: most of each start.
        seed: of the starts.
        device: of the solver, which is in double precision: `cpu` or `cuda`.

    Raises:
        SettingError: a number is below 1, or there is no such device.
    """

    solution: JointSolution
    """Of the rounds that were read last."""

    def __init__(
        self, starts: int = 6, iterations: int = 200, seed: int = 0, device: Literal["cpu", "cuda"] = "cpu"
    ) -> None:
        if starts < 1 or iterations < 1:
            raise SettingError(
                f"`model.rounds` needs starts >= 1 and iterations >= 1, but got starts={starts} and "
                f"iterations={iterations}."
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise SettingError("`model.rounds.device` is cuda, but PyTorch finds no such device here. Set it to cpu.")
        self.starts = starts
        self.iterations = iterations
        self.seed = seed
        self.device = device

    def requirements(self) -> list[Requirement]:
        return [SameClients(), HeadAlone(), FullBatches()]

    def read(
        self,
        updates: Sequence[Tensors],
        weights: Sequence[Tensors],
        training: Sequence[TrainingKnowledge],
        numbers: Sequence[int],
    ) -> tuple[Leakage, Tensor]:
        refuse_other_images(training, numbers)
        known = training[0]
        if known.reading:
            rank_zero_warn(
                "The peers' defence is known, but rounds of a frozen backbone are read as if there were none."
            )
        gradients = [augmented(u)[0].double() / t.lr for u, t in zip(updates, training, strict=True)]
        before = torch.stack([augmented(w)[0] for w in weights])
        rounds = StackedRounds.of(before, torch.stack(gradients), True, known.num_images)
        labels = None if known.labels is None else known.labels.sort().values
        self.solution = found = solve_rounds(
            rounds,
            labels,
            known.loss.label_smoothing,
            LocalSteps(known.steps, known.lr),
            self.starts,
            self.iterations,
            seed=self.seed,
            device=self.device,
        )
        if not found.explained:
            raise AttackError(
                f"The features of {counted(rounds.num_images, 'image')} were not found in rounds {numbers[0]} to "
                f"{numbers[-1]}: the least residual of {counted(len(found.tried), 'start')} is {found.residual:.3g} "
                "times the noise. The peers may have trained otherwise, or changed. Otherwise raise "
                "`model.rounds.starts` or `iterations`, or observe more rounds."
            )
        diagnosis = Diagnosis(
            num_images=rounds.num_images,
            held=len(found.labels.unique()),
            shown=rounds.num_images,
            disentangled=rounds.num_images,
            gap=found.gap,
            residual=found.residual * rounds.noise * rounds.gradients.numel() ** 0.5 / rounds.gradients.norm().item(),
            conditioning=found.conditioning,
            drift=0.0,
            outside=0.0,
            separated=True,
        )
        peers = torch.zeros(rounds.num_images, dtype=torch.long)
        leakage = Leakage(found.labels, found.features.float(), peers, diagnosis, found.expected_errors.float())
        return leakage, torch.ones(len(updates), rounds.num_images, dtype=torch.bool)

    def introduction(self) -> str:
        found = self.solution
        return (
            f"Joint rounds: start {len(found.tried)} of at most {self.starts} leaves {found.residual:.3g} times the "
            f"noise of the numbers unexplained, so the features of {int(found.certified.sum())} of {len(found.labels)} "
            f"images are certified; they are off by {found.expected_errors.median():.2g}, at most "
            f"{found.expected_errors.max():.2g}."
        )
