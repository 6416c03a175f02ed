"""How far to trust images that were found by matching the update."""

from attack_modules.attack import Level, Verdict

MOST_MISFIT = {Level.LIKELY: 0.05, Level.UNRELIABLE: 0.5}
"""Relative misfit of the update up to which images have a level. Measured: 16 to 23 dB at 0.15 to 0.3, where the low
resolution of the images is part of the misfit; 6 dB at 1.75, after clipping."""


def judge(misfit: float, num_images: int, typical: float = 0.0) -> Verdict:
    """One level for all images, since the update shows them together; never certain.

    Args:
        misfit: relative distance of the update that the images would have given to the observed one.
        num_images: N.
        typical: the median of the same of single parameters. Where one layer's update is far larger than all others, as
            that of a last layer that began at 0, the images may explain this layer alone.
    """
    level = next((level for level, most in MOST_MISFIT.items() if max(misfit, typical) <= most), Level.NOT_READ)
    reason = f"the images leave {misfit:.0%} of the update unexplained, and other images may explain it as well"
    if typical > misfit:
        reason += f"; of most parameters' updates they leave {typical:.0%}"
    if level is Level.NOT_READ:
        advice = (
            "Check what is assumed of the peers' training (rates, momentum, epochs, batches, labels) and whether "
            "updates are altered, or run more steps."
        )
    else:
        advice = "Where the head is linear, the closed form reads single images and measures its error: leakage.yaml."
    return Verdict([level] * num_images, reasons=[reason], advice=[advice])
