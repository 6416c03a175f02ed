"""The attack on vision transformers: an image from the update of the patch embedding."""

from typing import Any

import torch
from torch import Tensor, nn

from attack_modules.analytic.patch_embedding import OneImage, PatchEmbedding, PatchUpdate, TrainedPatchEmbedding
from attack_modules.analytic.patch_reading import Control, Estimate, PatchReading
from attack_modules.analytic.suspicion import qualified, suspected_defenses
from attack_modules.attack import Attack, Level, Reconstruction, Verdict
from attack_modules.feature_inversion.verdict import LEAST_PSNR
from attack_modules.threat_model.observed import RoundsSummary
from attack_modules.threat_model.requirements import LabelsOrLinearHead, Requirement, TrainedHead
from fl_lightning.errors import counted
from fl_lightning.seats import View

SETTLED = 1e-3
"""Relative change of smoothness and noise below which a step is the last that computes anything."""
MOST_SPECTRUM = 2.0
"""`Control.spectrum` from which an update is not that of one image."""
MARGIN = 5.0
"""PSNR in dB by which the expected one is lowered where noise beyond rounding was estimated. Measured: it is up to 5 dB
too high at noise of 10 % of the update."""


class PatchInversion(Attack):
    """A peer's only image, from the update of a vision transformer's patch embedding; its parameters ARE the images.

    The convolution's update is the sum over positions of errors times patches, and the position embedding's update is
    these errors: a linear equation for the patches of a single image, whatever the rate, the local steps and the rest
    of the model. It is solved under a prior of smooth images, since the rounding of the models is noise on both sides.
    A step of training is one solution, and a new estimate of how smooth the image is and how much noise there is.

    Rounds of the same client are taken to show the same image; a server that sees each client's update
    (`federation.seat: CuriousServer`) reads one image of each. Several images in one update are not read; the verdict
    tells.

    Args:
        subtract_own: subtract the attacker's own update from the aggregate first.
        checkpoint_every: steps between checkpoints.
    """

    def __init__(self, subtract_own: bool = True, checkpoint_every: int = 10) -> None:
        super().__init__(subtract_own, checkpoint_every)
        self.automatic_optimization = False  # a step is a solution, not a descent

    def requirements(self, processes: int) -> list[Requirement]:
        return [TrainedPatchEmbedding(), OneImage(), LabelsOrLinearHead(), TrainedHead()]

    def peak_memory(self, rounds: RoundsSummary, images: int) -> int:
        """The observed rounds, and one update at a time."""
        whole = sum(tensor.nbytes for tensor in rounds.model.state_dict().values())
        return 3 * len(rounds.assumptions) * whole + self.least_memory(rounds)

    def prepare(self) -> None:
        seen, shape = self.observed_rounds, self.observed_rounds[0].observation.image_shape
        model = seen[0].observation.build_model(shared=True)
        embedding = PatchEmbedding.of(model)
        weights = [name for name in model.head_parameters if name.endswith("weight")]
        shown: dict[View, list[PatchUpdate]] = {}
        labels: dict[View, int] = {}
        for observed in seen:
            update, told = self.update_of(observed), observed.assumptions.labels
            shown.setdefault(observed.client, []).append(PatchUpdate.of(observed, update, embedding))
            # of a single image, the row of its own class is the largest: the others sum up to it
            labels[observed.client] = told[0] if told else int(update[weights[-1]].norm(dim=1).argmax())
        mean, std = model.mean.double(), model.std.double()
        self.readings = [PatchReading(embedding, updates, mean, std, shape) for updates in shown.values()]
        starts = [reading.start() for reading in self.readings]
        self.images = nn.Parameter(torch.stack([start.image for start in starts]).to(torch.get_default_dtype()))
        self.register_buffer("labels", torch.tensor(list(labels.values())))
        self.register_buffer("smoothness", torch.tensor([start.smoothness for start in starts]))
        self.register_buffer("noise", torch.zeros(len(starts)))
        self.register_buffer("settled", torch.tensor(False))  # further steps would change nothing

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.images], lr=1.0)

    def _estimate(self, index: int) -> Estimate:
        image = self.images[index].detach().cpu().double()
        return Estimate(image, self.smoothness[index].item(), self.noise[index].item())

    @torch.no_grad()
    def training_step(self, batch: int, batch_idx: int) -> None:
        known = [self._estimate(index) for index in range(len(self.readings))]
        if not self.settled:
            pairs = zip(self.readings, list(known), strict=True)
            known = [reading.step(estimate) for reading, estimate in pairs]
        smoothness, noise = (torch.tensor([getattr(one, name) for one in known]) for name in ("smoothness", "noise"))
        self.settled.fill_(all(map(_close, (smoothness, noise), (self.smoothness.cpu(), self.noise.cpu()))))
        self.smoothness.copy_(smoothness)
        self.noise.copy_(noise)
        optimizer = self.optimizers()
        self.images.grad = self.images - torch.stack([estimate.image for estimate in known]).to(self.images)
        optimizer.step()
        self.log("residual", self.misfit(self.images, self.labels).max(), prog_bar=True)

    @torch.no_grad()
    def misfit(self, images: Tensor, labels: Tensor) -> Tensor:
        """(N,) share of the patch embedding's update that each image leaves unexplained."""
        pairs = zip(self.readings, images.cpu().double(), strict=True)
        return torch.tensor([reading.residual(image) for reading, image in pairs])

    def reconstruction(self) -> Reconstruction:
        several = len(self.labels) > 1
        return Reconstruction(
            self.images.detach().float().clamp(0, 1),
            self.labels,
            num_classes=self.observed_rounds[0].observation.num_classes,
            peers=torch.arange(len(self.labels)) if several else None,
        )

    def diagnosis(self) -> dict[str, Any]:
        return {
            "num_images": len(self.labels),
            "signal": [reading.signal for reading in self.readings],
            "smoothness": self.smoothness.tolist(),
            "noise": self.noise.tolist(),
        }

    @torch.no_grad()
    def verdict(self, misfit: Tensor) -> Verdict:
        controls = [reading.control(self._estimate(i)) for i, reading in enumerate(self.readings)]
        psnr = [
            control.psnr - MARGIN * (noise > 0) for control, noise in zip(controls, self.noise.tolist(), strict=True)
        ]
        levels, reasons, advice = [], {}, {}
        for index, (reading, control) in enumerate(zip(self.readings, controls, strict=True)):
            level = next((level for level, least in LEAST_PSNR.items() if psnr[index] >= least), Level.NOT_READ)
            for most, reason, remedy in _limits(reading, control, self.noise[index].item(), misfit[index].item()):
                level = level.limited(most)
                reasons[reason] = advice[remedy] = None
            levels.append(level)
        if not reasons and any(level is not Level.CERTAIN for level in levels):
            reasons["the models' rounding hides details: the update is small, or its errors are alike"] = None
            advice["More rounds of the same images, or rounds at a larger rate, show more."] = None
        seen = self.observed_rounds[0]
        verdict = Verdict(levels, reasons=list(reasons), advice=list(advice), expected_psnr=psnr)
        suspected = suspected_defenses(self.update_of(seen), seen.observation.before, seen.assumptions)
        return qualified(verdict, suspected, seen.assumptions)

    def introduction(self) -> str:
        reading = self.readings[0]
        embedding, update = reading.embedding, reading.updates[0]
        equations = len(reading.updates) * len(update.products)
        return (
            f"Patch embedding: {embedding.positions} positions of {update.products.shape[1]} pixel values under "
            f"{embedding.weight}, whose errors are rows {embedding.first} and on of {embedding.position}; {equations} "
            f"equations for each pixel value. The update is {reading.signal:.3g} times its rounding.\n"
            f"{counted(len(self.labels), 'image')} by least squares under a prior of smooth images, "
            f"{self.trainer.max_steps} steps."
        )


def _close(found: Tensor, before: Tensor) -> bool:
    return torch.allclose(found, before, rtol=SETTLED, atol=0)


def _limits(reading: PatchReading, control: Control, noise: float, misfit: float) -> list[tuple[Level, str, str]]:
    """The best levels that an image can have, each with a reason and what to try."""
    limits = []
    if reading.signal < 1:
        limits.append(
            (
                Level.NOT_READ,
                "the patch embedding's update is smaller than the rounding of the models",
                "Observe a later round, or one at a larger rate.",
            )
        )
    elif noise and control.spectrum > MOST_SPECTRUM:
        limits.append(
            (
                Level.UNRELIABLE,
                f"the patch embedding's update is not that of one image: {misfit:.2%} of it are left, and not as noise",
                "Several images, views or altered entries in one update add up. Attack them by gradient matching "
                "(`--model GradientInversion`), or from the seat of a server that sees single clients.",
            )
        )
    elif noise:
        limits.append(
            (
                Level.LIKELY,
                f"noise of standard deviation {noise:.2g} lies on the patch embedding's update",
                "Several rounds of the same image average the noise: `federation.observed_rounds`.",
            )
        )
    if not reading.testable:
        limits.append(
            (
                Level.LIKELY,
                f"{reading.embedding.positions} positions leave no equation over to tell whether there is one image",
                "Further rounds of the same image give more equations: `federation.observed_rounds`.",
            )
        )
    return limits
