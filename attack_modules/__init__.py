"""The attacker: from Observations to images."""

from attack_modules.diffusion.released.latent_diffusion import LatentDiffusion
from attack_modules.diffusion.released.mdt import MDTv2
from attack_modules.diffusion.released.openai import OpenAIDenoiser
from attack_modules.diffusion.schedules import Karras, LinearBetas
from attack_modules.diffusion.trained.class_conditional import TrainedConditional
from attack_modules.enhance.direct.ddrm import DDRM
from attack_modules.enhance.direct.diffpir import DiffPIR
from attack_modules.enhance.direct.enhancer import DirectEnhancement
from attack_modules.enhance.restoration import Restoration
from attack_modules.enhance.rog.enhancer import GAN
from attack_modules.enhance.semantic.enhancer import SemanticEnhancer
from attack_modules.enhance.semantic.reconstructed_image import ReconstructedImage
from attack_modules.feature_inversion.aliases import AttributedInversion, GuidedInversion, RefinedInversion
from attack_modules.feature_inversion.guidance import DiffusionGuidance
from attack_modules.feature_inversion.inversion import FeatureInversion
from attack_modules.feature_inversion.refinement import Refinement
from attack_modules.feature_inversion.rounds import ChangingParticipants, SameImages
from attack_modules.gradient_matching.gradient_inversion import GradientInversion
from attack_modules.gradient_matching.objectives import Cosine, SquaredL2
from attack_modules.priors import ChromaTotalVariation, TotalVariation

__all__ = [
    "DDRM",
    "GAN",
    "AttributedInversion",
    "ChangingParticipants",
    "ChromaTotalVariation",
    "Cosine",
    "DiffPIR",
    "DiffusionGuidance",
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
    "Refinement",
    "Restoration",
    "SameImages",
    "SemanticEnhancer",
    "SquaredL2",
    "TotalVariation",
    "TrainedConditional",
]
