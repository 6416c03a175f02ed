"""The attacker: from Observations to images."""

from attack_modules.diffusion.openai import OpenAIDenoiser
from attack_modules.diffusion.schedules import Karras, LinearBetas
from attack_modules.enhance.direct import DirectEnhancement
from attack_modules.feature_inversion import FeatureInversion
from attack_modules.inversion import GradientInversion
from attack_modules.objectives import Cosine, SquaredL2
from attack_modules.priors import ChromaTotalVariation, TotalVariation

__all__ = [
    "ChromaTotalVariation",
    "Cosine",
    "DirectEnhancement",
    "FeatureInversion",
    "GradientInversion",
    "Karras",
    "LinearBetas",
    "OpenAIDenoiser",
    "SquaredL2",
    "TotalVariation",
]
