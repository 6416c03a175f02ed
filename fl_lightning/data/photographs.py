"""The photographs included in scikit-image and scikit-learn, a dataset that needs no download."""

from importlib.resources import files

import torch

from fl_lightning.data.catalogue import Catalogue
from fl_lightning.data.federated import FederatedData
from fl_lightning.data.images import read_image

# Colourful, easily recognised photographs come first, because small runs use the first ones.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "motorcycle_left": ("skimage", "data/motorcycle_left.png"),
    "camera": ("skimage", "data/camera.png"),
    "coins": ("skimage", "data/coins.png"),
    "moon": ("skimage", "data/moon.png"),
    "brick": ("skimage", "data/brick.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
}


class Photographs(FederatedData):
    """16 photographs, each in a class of its own, read from the installed packages."""

    def catalogue(self) -> Catalogue:
        paths = [files(package) / path for package, path in PHOTOGRAPHS.values()]
        return Catalogue(
            labels=torch.arange(len(paths)),
            class_names=list(PHOTOGRAPHS),
            read=lambda index: read_image(paths[index], self.image_size, self.channels),
            source=["/".join(place) for place in PHOTOGRAPHS.values()].__getitem__,
        )
