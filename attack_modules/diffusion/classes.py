"""The classes that a class-conditional model knows, and how a user may name one."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torchvision.models import ResNet50_Weights

from fl_lightning.errors import SettingError

SYNSETS = Path(__file__).with_name("imagenet_synsets.txt")
"""ImageNet's 1000 synsets in the order of the standard class index, as in timm 1.0's `imagenet_synsets.txt`."""

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class ImageClass(NamedTuple):
    """One class."""

    name: str
    synset: str = ""
    """WordNet's, such as `n02097298`; empty if it has none."""


def imagenet_classes() -> list[ImageClass]:
    """ImageNet's 1000 classes in the order of the standard index: names of torchvision's, synsets of `SYNSETS`."""
    names = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    return [ImageClass(*pair) for pair in zip(names, SYNSETS.read_text().split(), strict=True)]


def class_index(wanted: int | str, classes: Sequence[ImageClass]) -> int:
    """The index of the class that a user names by index, synset or name, whatever the case of its letters.

    Raises:
        SettingError: there is none, or several classes have this name.
    """
    text = str(wanted).strip().lower()
    if text.lstrip("-").isdecimal():
        if 0 <= int(text) < len(classes):
            return int(text)
        raise SettingError(f"There is no class {text}: the model knows classes 0 to {len(classes) - 1}.")
    found = [i for i, known in enumerate(classes) if text in (known.name.lower(), known.synset)]
    if len(found) == 1:
        return found[0]
    if found:
        indices = " or ".join(f"{i} ({classes[i].synset})" if classes[i].synset else str(i) for i in found)
        raise SettingError(f"Several classes are called '{wanted}'. Give an index instead: {indices}.")
    names = [known.name for known in classes]
    near = difflib.get_close_matches(text, names, cutoff=0.5) or names[:3]
    raise SettingError(
        f"The model knows no class '{wanted}'. Give an index from 0 to {len(classes) - 1}, a synset if it has them, or "
        f"a name, for instance {', '.join(repr(name) for name in near)}."
    )
