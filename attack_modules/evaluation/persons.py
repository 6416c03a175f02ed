"""What leaked of each person, where several images show one. It reads the ground truth, so attacks must not call it."""

from typing import Any

from attack_modules.evaluation.metrics import Scorecard
from fl_lightning.truth import Truth

RECOGNISABLE = 20.0
"""PSNR in dB from which a person recognises what, or whom, an image shows: a convention, no measurement."""


def by_person(truth: Truth, scorecard: Scorecard) -> dict[str, dict[str, Any]]:
    """What leaked of each person, by name in alphabetical order; nothing where the data names no persons.

    Args:
        truth: the originals.
        scorecard: of the reconstructions matched to them.

    Returns:
        For each person `images`, the number of originals that show them, `found` of these, `seen` with a PSNR of
        `RECOGNISABLE` or more; `best_psnr` in dB, None if none was found; and the `clients` that hold them.
    """
    psnr = scorecard.per_image["psnr"].tolist()
    persons: dict[str, dict[str, Any]] = {}
    for name in sorted(set(truth.persons) - {""}):
        held = [row for row, person in enumerate(truth.persons) if person == name]
        found = [psnr[row] for row in held if scorecard.assignment[row] >= 0]
        persons[name] = {
            "images": len(held),
            "found": len(found),
            "seen": sum(value >= RECOGNISABLE for value in found),
            "best_psnr": max(found, default=None),
            "clients": sorted({int(truth.clients[row]) for row in held}),
        }
    return persons
