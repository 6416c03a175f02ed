"""How far to trust images that were inverted from leaked features, from what the attacker has."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from attack_modules.analytic.results import Leakage
from attack_modules.attack import Level, Verdict
from fl_lightning.errors import counted
from fl_lightning.models.freezing import batch_statistics

LEFT_OF_CORRECTION = 0.2
"""Share of a correction by simulated training that the features are still off. Measured: 0.05 to 0.16."""
DRIFT_TO_ERROR = 3.0
"""Error of features that were not corrected over the drift of the activations. Measured: 2.2 to 5.5."""
COMPRESSION = 3.5
"""Error of features of a pruned or quantised update over their uncertainty: what is lost is not independent from unit
to unit. Measured: 1.0 at 8 bits, 1.9 at 4 bits, 3.4 where 10 % of the entries are kept."""
SINGULAR_MISFIT = 4.0
"""Misfit over the median of all from which an image's features are those of several. Measured: at most 3.1 else."""
LEAST_SINGULAR = 0.02
"""Misfit below which an image is one whatever the others' misfits are."""
UNLIKE = 4.0
"""Misfit over that of known images, from which these tell nothing of an image. Measured of LeNet5 at 64 pixels, one
step: photographs 2 at most, at 30 dB and more; pages of text 12, of 16 to 25 dB; pure noise 45, of 9 dB, where 24 to 34
were expected."""
LEAST_PSNR = {Level.CERTAIN: 25.0, Level.LIKELY: 20.0, Level.UNRELIABLE: 14.0}
"""Expected PSNR in dB from which an image has a level."""
LEAST_GAIN = {Level.UNRELIABLE: 5.0, Level.NOT_READ: 1.0}
"""PSNR in dB that known images have above their mean colour, below which no image is better than this level. Measured:
where known ones have 3 (ResNet9 at 64 pixels), photographs come out at 16 to 23 dB, a dark one of little contrast as
noise."""
MUCH = 0.5
"""Share of the update from which too much is unexplained."""
LEAST_RESIDUAL = 0.02
"""Share of the update up to which what is unexplained does not matter. Beyond, features that drift leave at most 0.4 of
their correction unexplained as measured, images that are augmented 8 times as much as it."""
UNEXPLAINED_SHARED = 0.15
"""Share of both layers' updates from which too much is unexplained of several steps of images that share classes, whose
features drift in any case. Measured for radiographs and CIFAR-10: at most 0.05 of both where all images came out, 0.17
and 0.22 where their number was wrong by one, and images at 10 to 17 dB were certain or likely."""
MISMATCH = 10.0
"""Unexplained share of a single step's update times the singular value gap, from which it is no noise, which would
close the gap. Measured: 0.6 at one step, 1.0 at 8 bits, 57 to 204 where images are mixed."""
MANY = 0.25
"""Share of images without features of their own, or not found, from which no image is likely. Measured: 3 of 8 images
that were called likely were noise where 7 more had not been found."""
NOISY = 0.02
"""Share of the update from which noise is more than rounding."""
DRIFTING = 0.03
"""Drift of the activations above which refinement pays: measured, 3 dB or more above 8 %, 1 dB or none below 2 %."""


@dataclass(frozen=True)
class Evidence:
    """What an attacker has to tell how far off the features are that its images were inverted from.

    Attributes:
        leakage: of N images.
        corrected: (N, D) the features, corrected by the simulated training.
        misfit: (N,) relative distance of the features of the reconstructed images to these.
        drifts: whether features change during what was observed, and the training that changes them is as assumed.
        scale: factor by which the features leaked too small.
    """

    leakage: Leakage
    corrected: Tensor
    misfit: Tensor
    drifts: bool
    scale: float = 1.0

    @cached_property
    def moved(self) -> Tensor:
        """(N,) relative size of the correction."""
        leaked = self.leakage.features
        return (self.corrected - leaked).norm(dim=1) / leaked.norm(dim=1).clamp_min(torch.finfo(leaked.dtype).tiny)

    @cached_property
    def leaked_errors(self) -> Tensor:
        """(N,) relative errors of the features that the update tells.

        The larger of two that see different faults: the disagreement of the hidden units; and the features' change
        during the local steps, which all units share, and of which the simulated training corrects most.
        """
        found = self.leakage.diagnosis
        drift = torch.where(self.moved > 0, LEFT_OF_CORRECTION * self.moved, DRIFT_TO_ERROR * found.drift)
        defended = self.leakage.defended if self.leakage.noisy else None
        harm = defended.reading.harm if defended else COMPRESSION if found.compressed else 1.0
        uncertainty = self.leakage.uncertainty * harm
        return torch.maximum(uncertainty, drift * self.drifts)

    @cached_property
    def errors(self) -> Tensor:
        """(N,) expected relative errors of the features, by the misfit of the reconstructed images, too.

        Features that no image has are off by at least their distance to the nearest.
        """
        return torch.maximum(self.leaked_errors, self.misfit)

    @property
    def unexplained(self) -> bool:
        """Whether the update differs from what the images explain by more than features that drift can make."""
        found, labels = self.leakage.diagnosis, self.leakage.labels
        if not self.drifts or found.noise or found.compressed:
            return False
        if len(labels.unique()) < len(labels):
            return min(found.residual, found.drift) > UNEXPLAINED_SHARED
        return found.residual > LEAST_RESIDUAL and found.residual > self.moved.median().item()

    @property
    def mismatched(self) -> bool:
        """Whether a single step's update has the rank of its images, but not the form that it is taken to have."""
        found, labels = self.leakage.diagnosis, self.leakage.labels
        if self.drifts or self.scale != 1 or found.noise or found.compressed or len(labels.unique()) < len(labels):
            return False
        return found.residual > LEAST_RESIDUAL and found.residual * found.gap > MISMATCH


def judge(
    evidence: Evidence,
    psnr: list[float],
    best: float,
    model: nn.Module,
    flat: float = 0.0,
    gain: float = -math.inf,
    usual: Tensor | float = math.inf,
) -> Verdict:
    """Level of each image, with the reasons for less than certainty.

    An image's level is that of its expected PSNR, unless something that the expectation does not see limits it.

    Args:
        evidence: on N images.
        psnr: of each image, PSNR in dB expected at its error, see `controls.KnownImages`.
        best: PSNR in dB expected of features without an error.
        model: the attacked model.
        flat: PSNR in dB of the same image's mean colour.
        gain: PSNR in dB that known images of the found ones' contrast have above their mean colour; -inf if they were
            not tried. It counts where those of less contrast do not show that the features hold anything of an image.
        usual: (N,) misfit of known images whose features are as wrong as the update tells; inf if they were not tried.
    """
    leakage, errors, misfit = evidence.leakage, evidence.errors, evidence.misfit
    found = leakage.diagnosis
    most, reasons, advice = _limits(evidence, model)
    levels = [next((level for level, least in LEAST_PSNR.items() if p >= least), Level.NOT_READ) for p in psnr]
    for level, least in LEAST_GAIN.items():
        if best - flat < least:
            most_of_all = Level.UNRELIABLE if gain >= LEAST_GAIN[Level.NOT_READ] else level
            levels = [own.limited(most_of_all) for own in levels]
    levels = [level.limited(most) for level in levels]
    mixed = (misfit > SINGULAR_MISFIT * misfit.nanmedian()) & (misfit > LEAST_SINGULAR)
    if mixed.any():
        levels = _unreliable(levels, mixed)
        reasons.append(f"{counted(int(mixed.sum()), 'image')} came out with features of no single image")
        advice.append("Where images share classes, there may be more images than were counted: `knowledge.num_images`.")
    unlike = (misfit > UNLIKE * usual) & (misfit > LEAST_SINGULAR) & ~mixed
    if unlike.any():
        levels = _unreliable(levels, unlike)
        reasons.append(
            f"{counted(int(unlike.sum()), 'image')} came out further from the features than known ones do, as pictures "
            "of another kind do, whose quality known ones do not tell"
        )
        advice.append("Look at them: text and noise come out worse than photographs. More steps may help.")
    if len(model.head) == 1 and not found.separated:
        shared = leakage.labels.bincount()[leakage.labels] > 1
        if shared.any():
            levels = _unreliable(levels, shared)
            reasons.append(f"{int(shared.sum())} images share a class, of which a head of one layer shows the mean")
            advice.append("Attack images of one class by gradient matching (configs/paper.yaml), or name more rounds.")
    if best < max(LEAST_PSNR[Level.CERTAIN], flat + LEAST_GAIN[Level.UNRELIABLE]):
        known = f"known ones come back at {best:.0f} dB"
        known += f", their mean colour is at {flat:.0f} dB" if best - flat < LEAST_GAIN[Level.UNRELIABLE] else ""
        reasons.append(f"the model's features keep too little of an image: {known}")
        if not found.separated:  # under a frozen backbone, other layers show nothing
            advice.append("Attack by gradient matching, which uses all layers: configs/paper.yaml.")
    elif any(level is not Level.CERTAIN for level in levels):
        off = f"{error:.1%}" if (error := errors.median().item()) < 1 else "their own size and more"
        reasons.append(f"the features are off by {off}, as far as the attacker can tell")
    return Verdict(levels, found.num_images - found.disentangled, reasons, advice, psnr)


def _unreliable(levels: list[Level], which: Tensor) -> list[Level]:
    """The levels, of the images `which` (N,) bool unreliable at most."""
    return [level.limited(Level.UNRELIABLE) if w else level for level, w in zip(levels, which, strict=True)]


def _limits(evidence: Evidence, model: nn.Module) -> tuple[Level, list[str], list[str]]:
    """The best level that any image can have, and why."""
    found, scale = evidence.leakage.diagnosis, evidence.scale
    most, reasons, advice = Level.CERTAIN, [], []

    def limit(level: Level, reason: str, remedy: str) -> None:
        nonlocal most
        most = most.limited(level)
        reasons.append(reason)
        advice.append(remedy)

    if found.disentangled < found.num_images:
        missing = 1 - found.disentangled / found.num_images
        limit(
            Level.UNRELIABLE if missing > MANY else Level.LIKELY,
            f"{found.num_images - found.disentangled} of {found.num_images} images were not disentangled, and are "
            "mixed into others of their class",
            "Fewer local epochs, or known labels (`knowledge.labels`), disentangle more images.",
        )
    if found.shown > found.num_images:
        limit(
            Level.UNRELIABLE,
            f"{counted(found.num_images, 'image')} told, but the update shows {found.shown}",
            "Let the images be counted: `knowledge.num_images: inferred`.",
        )
    if found.views:
        limit(
            Level.UNRELIABLE,
            f"the update shows {found.num_images} directions for {found.held} classes, as if images were augmented",
            f"If the peers augment their images, give `knowledge.num_images: {found.held}`.",
        )
    elif not found.counted:
        held = "1 class is" if found.held == 1 else f"{found.held} classes are"
        limit(
            Level.LIKELY,
            f"the number of images cannot be read: the singular values do not fall, and {held} held",
            "Give the number of images as `knowledge.num_images`.",
        )
    if not found.checked:
        limit(
            Level.UNRELIABLE,
            f"no more hidden units are active than the {found.num_images} images, so that nothing checks the features",
            "Observe several rounds of the same peers (`federation.observed_rounds`), or attack by gradient matching "
            "(configs/paper.yaml).",
        )
    if found.noise and found.residual > NOISY:  # the uncertainty of the features accounts for it
        reasons.append(f"independent noise of standard deviation {found.noise:.2g} lies on the update")
        advice.append("Several rounds of the same peers average the noise: `federation.observed_rounds`.")
    elif found.residual > MUCH or evidence.unexplained:
        limit(
            Level.UNRELIABLE,
            f"{found.residual:.0%} of the head's update are unexplained",
            "Check what is assumed of the peers' training: loss, rate, optimiser, batches, epochs, number of images; "
            "and whether images are augmented.",
        )
    elif evidence.mismatched:
        limit(
            Level.UNRELIABLE,
            f"{found.residual:.0%} of the head's update are unexplained, although its rank is that of the images, as "
            "if images were mixed (mixup) or the loss were another",
            "Check what is assumed of the peers' loss and images.",
        )
    if (evidence.errors > 1).double().mean() > MANY:
        limit(
            Level.UNRELIABLE,
            "many images came out without features of their own, and disturb the others",
            "Give `knowledge.num_images` or `.labels` if you can, or attack by gradient matching (configs/paper.yaml).",
        )
    if scale != 1:
        limit(
            Level.LIKELY,
            f"the features leaked {_times(scale)} as by clipping, an untold momentum or another learning rate, and "
            "were inverted by their direction",
            "Check `knowledge.client_lr`, `.server_lr`, `.momentum` and whether updates are clipped.",
        )
    if batch_statistics(model):
        limit(
            Level.UNRELIABLE,
            "the model normalises by the statistics of the peers' batches, which the attacker does not know",
            "If the peers train with frozen statistics, observe models that hold these, which do not change.",
        )
    if found.drift > DRIFTING:
        reasons.append(f"the local training changes the activations by {found.drift:.0%}")
        advice.append("Refinement matches all local steps: configs/refined.yaml.")
    return most, reasons, advice


def _times(scale: float) -> str:
    return f"{scale:.2g} times too small," if scale > 1 else f"{1 / scale:.2g} times too large,"
