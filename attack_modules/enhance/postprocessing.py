"""Running enhancements on what an attack ends with."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attack_modules.attack import Attack, Reconstruction
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.threat_model.observed import RoundsSummary
from fl_lightning.errors import AuditError


@dataclass(frozen=True)
class Enhanced:
    """The images of one enhancement, on the CPU.

    Attributes:
        name: by which results and files are named.
        enhancer: class name of what made them.
        images: (N, C, H, W) in [0, 1], in the order of the reconstruction.
        misfit: (N,) or (), see `Attack.misfit`.
        seconds: wall time.
    """

    name: str
    enhancer: str
    images: Tensor
    misfit: Tensor
    seconds: float


@dataclass
class Postprocessing:
    """Enhancements to run after an attack.

    Attributes:
        enhancers: by name. Of several, one that refuses these images is left out; a single one raises its error.
        left_out: enhancements that are not available, with the reason.
    """

    enhancers: dict[str, Enhancer] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def compares(self) -> bool:
        """Whether several enhancements are compared."""
        return len(self.enhancers) + len(self.left_out) > 1

    def check(self, rounds: RoundsSummary) -> None:
        """Refuse, or leave out of a comparison, what does not fit the rounds, before they are attacked.

        Raises:
            AuditError: the only enhancement does not support these images or classes.
        """
        for name, enhancer in list(self.enhancers.items()):
            try:
                enhancer.check(rounds.image_shape, rounds.model.hparams["num_classes"])
            except AuditError as error:
                if not self.compares:
                    raise
                self.left_out[name] = str(error)
                del self.enhancers[name]

    def run(self, attack: Attack, reconstruction: Reconstruction, seed: int) -> Iterator[Enhanced]:
        """Enhance the images, one enhancement after another; all processes must iterate over them together.

        Raises:
            AuditError: the only enhancement refuses these images.
        """
        for name, enhancer in self.enhancers.items():
            began = time.perf_counter()
            chunks = torch.arange(len(reconstruction.images)).split(enhancer.chunk_size)
            images = torch.zeros_like(reconstruction.images)
            try:
                with attack.ranks.fail_together():
                    for number in attack.ranks.shard(len(chunks)).tolist():
                        part = reconstruction.part(chunks[number])
                        images[chunks[number]] = enhancer.enhance(part, seed).to(images)
            except AuditError as error:
                if not self.compares:
                    raise
                self.left_out[name] = str(error)
                continue
            images = attack.ranks.reduce(images)
            seconds = time.perf_counter() - began
            misfit = attack.misfit(images, reconstruction.labels).cpu()
            yield Enhanced(name, type(enhancer).__name__, images.cpu(), misfit, seconds)
