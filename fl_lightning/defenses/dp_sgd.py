"""DP-SGD: noise on clipped gradients of single images."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fl_lightning.defenses.defense import ClientDefense, Occasion
from fl_lightning.defenses.mixup import Mixup
from fl_lightning.defenses.privacy import Privacy, epsilon_of, refuse_unaccountable
from fl_lightning.errors import SettingError, in_short, positive
from fl_lightning.models import ImageClassifier


@dataclass(frozen=True)
class DPSGD(ClientDefense):
    """Each image's gradient is clipped and noise is added to their sum in every local step (Abadi et al. 2016).

    Opacus computes the gradients, clips and adds the noise. Each image is in one batch of an epoch, so the guarantee is
    that of one Gaussian mechanism an epoch.

    Args:
        max_grad_norm: largest norm of an image's gradient over all parameters.
        noise_multiplier: standard deviation of the noise over `max_grad_norm`.
        delta: at which epsilon is reported.

    Raises:
        SettingError: Opacus is not installed; or, when training starts, the model mixes the images of a batch.
    """

    max_grad_norm: float = 1.0
    noise_multiplier: float = 1.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        refuse_unaccountable("DPSGD", self.delta)
        if not positive(self.max_grad_norm, self.noise_multiplier):
            raise SettingError(
                f"DPSGD needs max_grad_norm > 0 and noise_multiplier > 0, but got {self.max_grad_norm} and "
                f"{self.noise_multiplier}."
            )

    def refuse_beside(self, others: Sequence[ClientDefense], class_weights: Sequence[float] | None) -> None:
        changing = [o for o in others if isinstance(o, Mixup) or type(o).on_gradient != ClientDefense.on_gradient]
        if changing or class_weights:
            what = ", ".join(type(other).__name__ for other in changing) or "`federation.client.class_weights`"
            raise SettingError(
                f"DPSGD guarantees nothing beside {what}, by which an image changes the gradients of others or what "
                "becomes of them. Leave one of them out."
            )

    def privacy(self, rounds: int, local_epochs: int) -> Privacy:
        return Privacy("image", epsilon_of(self.noise_multiplier, rounds * local_epochs, self.delta), self.delta, False)

    def start(self, model: ImageClassifier, occasion: Occasion) -> None:
        from opacus import GradSampleModule

        gc.collect()  # Opacus' hooks and the former client's model refer to each other
        if any(isinstance(layer, _BatchNorm) and layer.training for layer in model.modules()):
            raise SettingError(
                f"{type(model).__name__} has BatchNorm, which mixes the images of a batch, so that no image has a "
                "gradient of its own for DPSGD. Use a model with GroupNorm, or without normalisation, in its place."
            )
        logging.getLogger("opacus").setLevel(logging.ERROR)  # it notes that normalisation constants are buffers
        try:
            GradSampleModule(model, strict=False)  # hooks on the layers, which the model keeps
        except Exception as error:
            raise SettingError(
                f"Opacus cannot train {type(model).__name__} ({in_short(error)}). Choose another model, or LocalDP or "
                "DPFedAvg, which act on the update."
            ) from error

    def on_gradient(self, model: ImageClassifier, images: Tensor, occasion: Occasion) -> None:
        from opacus.optimizers import DPOptimizer

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = parameters[0].device
        seed = int(torch.randint(2**31, (), generator=occasion.generator))
        private = DPOptimizer(
            torch.optim.SGD(parameters, lr=1.0),  # only to hold the parameters: the client's own optimiser steps
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=len(images),
            generator=torch.Generator(device).manual_seed(seed),
        )
        private.pre_step()
        for parameter in parameters:
            parameter.grad_sample = parameter.summed_grad = None
