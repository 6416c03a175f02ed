"""The attacker: from Observations to images."""

from attack_modules.attributed_inversion import AttributedInversion
from attack_modules.diffusion.latent import LatentDiffusion
from attack_modules.diffusion.mdt import MDTv2
from attack_modules.diffusion.openai import OpenAIDenoiser
from attack_modules.diffusion.schedules import Karras, LinearBetas
from attack_modules.diffusion.small import TrainedConditional
from attack_modules.enhance.ddrm import DDRM
from attack_modules.enhance.diffpir import DiffPIR
from attack_modules.enhance.direct import DirectEnhancement
from attack_modules.enhance.gan import GAN
from attack_modules.enhance.restoration import Restoration
from attack_modules.enhance.semantic import ReconstructedImage, SemanticEnhancer
from attack_modules.feature_inversion import FeatureInversion
from attack_modules.guided_inversion import GuidedInversion
from attack_modules.inversion import GradientInversion
from attack_modules.objectives import Cosine, SquaredL2
from attack_modules.priors import ChromaTotalVariation, TotalVariation
from attack_modules.refined_inversion import RefinedInversion

__all__ = [
    "DDRM",
    "GAN",
    "AttributedInversion",
    "ChromaTotalVariation",
    "Cosine",
    "DiffPIR",
    "DirectEnhancement",
    "FeatureInversion",
    "GradientInversion",
    "GuidedInversion",
    "Karras",
    "LatentDiffusion",
    "LinearBetas",
    "MDTv2",
    "OpenAIDenoiser",
    "ReconstructedImage",
    "RefinedInversion",
    "Restoration",
    "SemanticEnhancer",
    "SquaredL2",
    "TotalVariation",
    "TrainedConditional",
]
