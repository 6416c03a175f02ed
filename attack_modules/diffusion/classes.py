"""Classes of class-conditional models, and their lookup by index, synset or name."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torchvision.models import ResNet50_Weights

from fl_lightning.errors import SettingError

SYNSETS = Path(__file__).with_name("imagenet_synsets.txt")
"""File of ImageNet's 1000 synsets in standard class order, as in timm 1.0's `imagenet_synsets.txt`."""

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class ImageClass(NamedTuple):
    """A class that a model is conditioned on."""

    name: str
    synset: str = ""
    """WordNet synset, such as `n02097298`; empty if the class has none."""


def imagenet_classes() -> list[ImageClass]:
    """Return ImageNet's 1000 classes in standard order, with torchvision's names and the synsets of `SYNSETS`."""
    names = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    return [ImageClass(*pair) for pair in zip(names, SYNSETS.read_text().split(), strict=True)]


def class_index(wanted: int | str, classes: Sequence[ImageClass]) -> int:
    """Return the index of the class that is given by index, synset or name.

    Args:
        wanted: index, WordNet synset or name of the class; case is ignored.
        classes: all classes of the model, in label order.

    Raises:
        SettingError: no class matches, also of an empty text, or several classes have this name.
    """
    text = str(wanted).strip().lower()
    if re.fullmatch(r"-?\d{1,9}", text):
        if 0 <= int(text) < len(classes):
            return int(text)
        raise SettingError(f"Class index {text} is out of range: the model has classes 0 to {len(classes) - 1}.")
    found = [i for i, known in enumerate(classes) if text and text in (known.name.lower(), known.synset)]
    if len(found) == 1:
        return found[0]
    if found:
        indices = " or ".join(f"{i} ({classes[i].synset})" if classes[i].synset else str(i) for i in found)
        raise SettingError(f"Several classes are called '{wanted}'. Give the index instead: {indices}.")
    names = [known.name for known in classes]
    near = difflib.get_close_matches(text, names, cutoff=0.5) or names[:3]
    raise SettingError(
        f"The model has no class '{wanted}'. Give an index from 0 to {len(classes) - 1}, a synset if the classes have "
        f"them, or a name, for example {', '.join(repr(name) for name in near)}."
    )
