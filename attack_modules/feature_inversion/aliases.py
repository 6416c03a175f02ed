"""Former class names of `FeatureInversion` with one component, for saved configurations and checkpoints."""

from pathlib import Path
from typing import Any

from attack_modules.diffusion.denoiser import Denoiser
from attack_modules.feature_inversion.guidance import DiffusionGuidance
from attack_modules.feature_inversion.inversion import FeatureInversion
from attack_modules.feature_inversion.refinement import Refinement
from attack_modules.feature_inversion.rounds import ChangingParticipants


class RefinedInversion(FeatureInversion):
    """`FeatureInversion` with `refinement: Refinement`.

    Args:
        resimulations: see `Refinement`.
        settings: those of `FeatureInversion`.
    """

    def __init__(self, *, resimulations: int = 8, **settings: Any) -> None:
        super().__init__(refinement=Refinement(resimulations), **settings)


class GuidedInversion(FeatureInversion):
    """`FeatureInversion` with `guidance: DiffusionGuidance`.

    Args:
        denoiser: see `DiffusionGuidance`, as the next four.
        weight: of the penalty.
        sigma_per_error: sigma at a relative feature error of one.
        sigma_start: upper limit of sigma.
        denoise_every: steps between denoisings.
        settings: those of `FeatureInversion`.
    """

    def __init__(
        self,
        denoiser: Path | Denoiser,
        weight: float = 0.5,
        sigma_per_error: float = 1.5,
        sigma_start: float = 0.1,
        denoise_every: int = 12,
        **settings: Any,
    ) -> None:
        guidance = DiffusionGuidance(denoiser, weight, sigma_per_error, sigma_start, denoise_every)
        super().__init__(guidance=guidance, **settings)


class AttributedInversion(FeatureInversion):
    """`FeatureInversion` with `rounds: ChangingParticipants`.

    Args:
        settings: those of `FeatureInversion`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(rounds=ChangingParticipants(), **settings)
