"""What feature inversion says before it begins, a few sentences for each part."""

from collections.abc import Sequence

import torch

from attack_modules.analytic.results import Leakage
from attack_modules.feature_inversion.decoder import FeatureDecoder
from attack_modules.feature_inversion.learned_decoder import PhotographDecoder
from attack_modules.feature_inversion.pooling_positions import PoolingPositions
from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.errors import counted


def of_closed_form(leakage: Leakage, rounds: Sequence[ObservedRound]) -> str:
    """How many images of how many peers the updates of the rounds hold, and how well they were read."""
    found, sources = leakage.diagnosis, rounds[0].assumptions.sources
    subject = f"updates of {len(rounds)} rounds hold" if len(rounds) > 1 else "update holds"
    text = (
        f"Closed form: the head's {subject} {counted(found.num_images, 'image')}, {found.disentangled} disentangled, "
        f"of {counted(len(leakage.peers.unique()), 'peer')}; labels {sources['labels']}. Singular value gap "
        f"{found.gap:.3g}, residual {found.residual:.2%}, condition number {found.conditioning:.3g}, drift "
        f"{found.drift:.2%}, outside {found.outside:.2%}."
    )
    if leakage.seen is not None:
        text += f" Dropout left {leakage.seen.double().mean():.0%} of the features to be seen."
    return text


def of_start(decoder: FeatureDecoder | PhotographDecoder | PoolingPositions | None, inverts: bool) -> str:
    """Of which images the inversion begins; where it does not pay, those are the result."""
    match decoder:
        case None:
            return "grey images, since the features are not a map"
        case FeatureDecoder():
            return "linearly decoded images"
        case PoolingPositions():
            return "images for which the positions of maxima were drawn, which are kept"
    kept = "" if inverts else ", which are kept, since held-out ones are not improved by inversion"
    return f"images decoded by regression of photographs on {decoder.numbers:,} distinct features{kept}"


def of_defence(leakage: Leakage, once: bool) -> str:
    """How a known defence is read, `once` or again with the images found so far; empty without."""
    if leakage.defended is None:
        return ""
    reading = leakage.defended.reading
    text = f"Known defence or optimiser: the head's first layer is read by {type(reading).__name__}"
    if once:
        return f"{text}, once."
    if reading.resolves:
        text += f", and once more at {reading.resolves} steps with the images found so far"
    text += f". It leaves the features off by {leakage.uncertainty.median():.1%}"
    if leakage.noisy:
        text += ", in proportion to which the prior weighs"
    if (mixing := leakage.mixing) is not None:
        alone, amplified = int((mixing.diagonal() == 1).sum()), torch.linalg.inv(mixing).norm(dim=1).median()
        text += (
            f". Of {len(mixing)} images {len(mixing) - alone} were mixed with another; unmixing amplifies errors "
            f"{amplified:.2g} times"
        )
    return f"{text}."
