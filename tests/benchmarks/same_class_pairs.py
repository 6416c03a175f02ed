"""Writes a list of images of which some share their class.

    python tests/benchmarks/same_class_pairs.py FOLDER LIST.csv --seed 0

FOLDER/<class>/*.jpg has one image a class, so the second of a pair is given the label of the first. For
`python cli.py fit --config configs/leakage.yaml --data.csv LIST.csv --data.num_classes 1000`.
"""

import csv
import random
from argparse import ArgumentParser
from pathlib import Path

PEERS, PAIRS = 4, 8

parser = ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("list", type=Path)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--images-per-client", type=int, default=16)
arguments = parser.parse_args()

classes = sorted(folder for folder in arguments.folder.iterdir() if folder.is_dir())
drawn = random.Random(arguments.seed).sample(range(len(classes)), (PEERS + 1) * arguments.images_per_client)
owners = [client for client in (*map(str, range(PEERS)), "attacker") for _ in range(arguments.images_per_client)]
victims = PEERS * arguments.images_per_client
paired = random.Random(arguments.seed + 1).sample(range(victims), 2 * PAIRS)  # of one peer or of two
labels = dict(enumerate(drawn)) | {second: drawn[first] for first, second in zip(*[iter(paired)] * 2, strict=True)}
with arguments.list.open("w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["path", "label", "client"])
    for position, number in enumerate(drawn):
        image = min(classes[number].glob("*.jpg")).resolve()
        table.writerow([image, labels[position], owners[position]])
