"""The attacker: from Observations to images."""

from attack_modules.feature_inversion import FeatureInversion
from attack_modules.inversion import GradientInversion
from attack_modules.objectives import Cosine, SquaredL2
from attack_modules.priors import ChromaTotalVariation, TotalVariation

__all__ = ["ChromaTotalVariation", "Cosine", "FeatureInversion", "GradientInversion", "SquaredL2", "TotalVariation"]
