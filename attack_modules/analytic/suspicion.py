"""What an attacker should suspect behind an update, where nobody has told it."""

from dataclasses import replace

from attack_modules.analytic.counting import active_entries, is_compressed
from attack_modules.analytic.row_space import float_spacing
from attack_modules.attack import Level, Verdict
from attack_modules.threat_model.assumptions import Assumptions
from attack_modules.threat_model.plausibility import looks_like_signs
from fl_lightning.client import Tensors
from fl_lightning.defenses import (
    QSGD,
    Augmentation,
    HalfPrecision,
    Mixup,
    PartialSharing,
    Quantization,
    RandomK,
    Sign,
    TopK,
)

MANY_ZEROS = 0.2
"""Share of zeros beyond that of rounding, see `is_compressed`."""
FEW_LEVELS = (Quantization, QSGD)
VIEWS = "the peers augment their images, so what is found are their views at best"
MIXTURES = "the peers mix their images, so what is found are mixtures of two at best"


def qualified(verdict: Verdict, suspected: list[str], assumptions: Assumptions, unmixed: bool = False) -> Verdict:
    """A verdict with what else is to be suspected.

    Of a single local step, what a known defence made of the images comes out as exactly as an image would. Of several
    known defences one is read: images whose noise was may be mixtures still, unless they were `unmixed`.

    Args:
        verdict: of what was read from an update.
        suspected: clauses of `suspected_defenses`.
        assumptions: what the attacker is told of the round, and guesses.
        unmixed: whether mixtures were read as such.
    """
    verdict = verdict.suspecting(suspected)
    for kind, reason in ((Augmentation, VIEWS), (Mixup, MIXTURES)):
        if not (unmixed and kind is Mixup) and any(isinstance(defense, kind) for defense in assumptions.defenses):
            levels = [level.limited(Level.UNRELIABLE) for level in verdict.levels]
            verdict = replace(verdict, levels=levels, reasons=[*verdict.reasons, reason])
    return verdict


def suspected_defenses(update: Tensors, before: Tensors, assumptions: Assumptions, read: bool = False) -> list[str]:
    """What an update looks like, each a clause; noise, clipping and views are told by what is read from it.

    What is assumed anyway is not suspected, and no defence is where all are told.

    Args:
        update: parameters before minus after, by name.
        before: the same parameters before.
        assumptions: what the attacker is told of the round, and guesses.
        read: whether the attack read the update as what the assumed optimiser and defences made it.
    """
    assumed = [*assumptions.defenses, *assumptions.server_defenses]
    told = assumptions.sources.get("defenses") == "known"

    def explained(*kinds: type) -> bool:
        return any(isinstance(defense, kinds) for defense in assumed)

    found = []
    if assumptions.optimizer == "Adam" and not read:
        found.append("the peers train by Adam, which this attack takes for SGD")
    still = [name for name, tensor in update.items() if not tensor.any()]
    if still and len(still) < len(update) and not explained(PartialSharing):
        shown = ", ".join(still[:3]) + (", ..." if len(still) > 3 else "")
        kept = "" if told else "kept them for themselves or "
        found.append(f"{shown} did not change, as if clients {kept}did not train them")
    matrices = {name: tensor.flatten(1) for name, tensor in update.items() if tensor.ndim > 1 and tensor.any()}
    if not matrices:  # the few entries of biases show nothing
        return found
    largest = max(matrices, key=lambda name: matrices[name].numel())
    spacing = float_spacing(before[largest])
    entries = active_entries(matrices[largest], spacing)
    if looks_like_signs(update):
        causes = [] if told else ["signs", "few levels"]
        causes += [] if assumptions.sources.get("optimizer") == "known" else ["Adam at the clients"]
        if causes and assumptions.optimizer != "Adam" and not explained(Sign, *FEW_LEVELS):
            found.append(f"the update's entries are nearly of one size, as by {' or '.join(causes)}")
    elif is_compressed(entries, spacing) and not told:
        if (entries == 0).double().mean() <= MANY_ZEROS:
            if not explained(HalfPrecision, *FEW_LEVELS):
                found.append("the update's entries have few values, as by quantisation")
        elif not explained(TopK, RandomK, *FEW_LEVELS):
            found.append("many of the update's entries are 0, as by top-k or random sparsification, or by few levels")
    return found
