"""The attacker: observed rounds in, reconstructed images out.

The classes that configurations name by a short name can be imported from here; each is loaded on first use.
"""

import importlib
from typing import Any

_HOMES = {
    "AttributedInversion": "feature_inversion.aliases",
    "BatchStatistics": "feature_inversion.batch_statistics",
    "ChangingParticipants": "feature_inversion.rounds",
    "ChromaTotalVariation": "priors",
    "Convolutions": "feature_inversion.convolutions",
    "Cosine": "gradient_matching.objectives",
    "DDRM": "enhance.direct.ddrm",
    "DiffPIR": "enhance.direct.diffpir",
    "DiffusionGuidance": "feature_inversion.guidance",
    "DirectEnhancement": "enhance.direct.enhancer",
    "FeatureInversion": "feature_inversion.inversion",
    "FrozenBackbone": "feature_inversion.frozen_backbone",
    "GAN": "enhance.rog.enhancer",
    "GradientInversion": "gradient_matching.gradient_inversion",
    "GuidedInversion": "feature_inversion.aliases",
    "Karras": "diffusion.schedules",
    "LatentDiffusion": "diffusion.released.latent_diffusion",
    "LearnedDecoder": "feature_inversion.learned_decoder",
    "LinearBetas": "diffusion.schedules",
    "MDTv2": "diffusion.released.mdt",
    "OpenAIDenoiser": "diffusion.released.openai",
    "PatchInversion": "feature_inversion.patch_inversion",
    "ReconstructedImage": "enhance.semantic.reconstructed_image",
    "RefinedInversion": "feature_inversion.aliases",
    "Refinement": "feature_inversion.refinement",
    "Restoration": "enhance.restoration",
    "SameImages": "feature_inversion.rounds",
    "SemanticEnhancer": "enhance.semantic.enhancer",
    "SquaredL2": "gradient_matching.objectives",
    "TotalVariation": "priors",
    "TrainedConditional": "diffusion.trained.class_conditional",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attack_modules' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"attack_modules.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def load_all() -> None:
    """Import every class that goes by a short name, so that the command line finds it."""
    for name in __all__:
        __getattr__(name)
