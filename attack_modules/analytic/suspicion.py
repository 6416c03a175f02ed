"""Which defence an update looks like: what an attacker who is told of none should suspect."""

from attack_modules.analytic.counting import active_entries, is_compressed
from attack_modules.analytic.row_space import float_spacing
from attack_modules.threat_model.plausibility import looks_like_signs
from fl_lightning.client import Tensors

MANY_ZEROS = 0.2
"""Share of zeros beyond that of rounding, see `is_compressed`."""


def suspected_defenses(update: Tensors, before: Tensors) -> list[str]:
    """What an update looks like, each a clause; noise, clipping and views are told by what is read from it.

    Args:
        update: parameters before minus after, by name.
        before: the same parameters before.
    """
    found = []
    still = [name for name, tensor in update.items() if not tensor.any()]
    if still and len(still) < len(update):
        shown = ", ".join(still[:3]) + (", ..." if len(still) > 3 else "")
        found.append(f"{shown} did not change, as if clients kept them for themselves or did not train them")
    matrices = {name: tensor.flatten(1) for name, tensor in update.items() if tensor.ndim > 1 and tensor.any()}
    if not matrices:  # the few entries of biases show nothing
        return found
    largest = max(matrices, key=lambda name: matrices[name].numel())
    spacing = float_spacing(before[largest])
    entries = active_entries(matrices[largest], spacing)
    if looks_like_signs(update):
        found.append("the update's entries are nearly of one size, as by signs, few levels, or Adam at the clients")
    elif is_compressed(entries, spacing):
        if (entries == 0).double().mean() > MANY_ZEROS:
            found.append("many of the update's entries are 0, as by top-k or random sparsification, or by few levels")
        else:
            found.append("the update's entries have few values, as by quantisation")
    return found
