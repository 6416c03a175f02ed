"""How far to trust images that were found by matching the update."""

from attack_modules.attack import Level, Verdict

LIKELY = 0.03
"""Relative misfit of the update up to which images are likely."""
UNRELIABLE = 0.5
"""Relative misfit of the update up to which the images explain most of it."""


def judge(misfit: float, num_images: int) -> Verdict:
    return Verdict([Level.UNRELIABLE] * num_images)
