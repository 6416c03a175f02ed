"""Enhancements with preset settings, selected by a single name on the command line."""

from collections.abc import Callable

from attack_modules.diffusion.trained.class_conditional import TrainedConditional
from attack_modules.enhance.direct.enhancer import DirectEnhancement
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.enhance.rog.enhancer import GAN
from attack_modules.enhance.semantic.enhancer import SemanticEnhancer
from fl_lightning.errors import AuditError


def small_semantic() -> SemanticEnhancer:
    """Semantic enhancement with the shipped CIFAR-10 model and the settings of `configs/semantic_demo.yaml`."""
    return SemanticEnhancer(TrainedConditional(), lr=0.05, timesteps=25, steps=40, starts=8, patience=10)


NAMED: dict[str, Callable[[], Enhancer]] = {"direct": DirectEnhancement, "gan": GAN, "semantic": small_semantic}
"""Constructors of the enhancements that `--postprocess <name>` selects."""


def all_that_can_be() -> tuple[dict[str, Enhancer], dict[str, str]]:
    """Construct every enhancement of `NAMED` that is available.

    Returns:
        The constructed enhancements by name, and the error messages of the unavailable ones by name.
    """
    enhancers, left_out = {}, {}
    for name, make in NAMED.items():
        try:
            enhancers[name] = make()
        except AuditError as error:
            left_out[name] = str(error)
    return enhancers, left_out
