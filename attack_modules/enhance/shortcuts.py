"""Enhancements that go by one word on the command line, as they are used without further settings."""

from collections.abc import Callable

from attack_modules.diffusion.trained.class_conditional import TrainedConditional
from attack_modules.enhance.direct.enhancer import DirectEnhancement
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.enhance.rog.enhancer import GAN
from attack_modules.enhance.semantic.enhancer import SemanticEnhancer
from fl_lightning.errors import AuditError


def small_semantic() -> SemanticEnhancer:
    """Semantic enhancement with the shipped model of CIFAR-10, at the settings of `configs/semantic_demo.yaml`."""
    return SemanticEnhancer(TrainedConditional(), lr=0.05, timesteps=25, steps=40, starts=8, patience=10)


NAMED: dict[str, Callable[[], Enhancer]] = {"direct": DirectEnhancement, "gan": GAN, "semantic": small_semantic}
"""What `--postprocess <name>` makes."""


def all_that_can_be() -> tuple[dict[str, Enhancer], dict[str, str]]:
    """Every enhancement of `NAMED` that has its weights, and the reasons why the others have not."""
    enhancers, left_out = {}, {}
    for name, make in NAMED.items():
        try:
            enhancers[name] = make()
        except AuditError as error:
            left_out[name] = str(error)
    return enhancers, left_out
