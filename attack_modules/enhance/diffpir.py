"""DiffPIR (Zhu et al. 2023, arXiv 2305.08995) for images of which every pixel is known, some better than others."""

from torch import Tensor

from attack_modules.enhance.ddrm import Denoise, Noise


def diffpir(
    denoise: Denoise,
    observed: Tensor,
    sigma_y: Tensor,
    sigmas: Tensor,
    noise: Noise,
    strength: float = 1.0,
    zeta: float = 1.0,
) -> Tensor:
    """Images that are likely under the denoiser, and near to what was observed as far as that is sure.

    Algorithm 1 of the paper with the identity as degradation, for which its proximal step is a weighted mean.

    Args:
        denoise: the prior.
        observed: (N, C, H, W) images in [0, 1], plus noise.
        sigma_y: () or any shape that broadcasts to `observed`: standard deviation of that noise, pixel by pixel.
        sigmas: (T,) or (T, N) noise levels, falling, the same for all images or each one's own.
        noise: the only source of chance; with zeros, the result comes near to the posterior's mean. Called at the
            start and, unless zeta is 0, before each further level.
        strength: the paper's lambda, weight of the prior beside the observation.
        zeta: share of fresh noise in every step, in [0, 1]; with 0 nothing is random but the start. With all of it a
            wrong guess is soonest forgotten.

    Returns:
        (N, C, H, W), not clamped.
    """
    certainty = sigma_y.clamp_min(1e-4) ** -2
    levels = sigmas.view(len(sigmas), -1, 1, 1, 1)
    # Where the observation is noisier than the first level it already is the iterate.
    x = observed + (levels[0] ** 2 - sigma_y**2).clamp_min(0).sqrt() * noise()
    for step, level in enumerate(levels):
        rho = strength / level**2
        clean = (certainty * observed + rho * denoise(x, sigmas[step])) / (certainty + rho)
        if step + 1 == len(levels):
            return clean
        fresh = noise() if zeta else 0.0
        x = clean + levels[step + 1] * ((1 - zeta) ** 0.5 * (x - clean) / level + zeta**0.5 * fresh)
    return x
