"""A table that grows row by row, by defence and seed, so that a script can be stopped and called again."""

import csv
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Iterable
from pathlib import Path


def arguments(purpose: str, names: Collection[str]) -> ArgumentParser:
    """What both scripts are told."""
    parser = ArgumentParser(description=purpose)
    parser.add_argument("root", type=Path, help="the images")
    parser.add_argument("table", type=Path, help="a .csv file, to which the rows are appended that it lacks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--defences", nargs="+", choices=names, default=list(names))
    return parser


def fill(given: Namespace, columns: Iterable[str], row_of: Callable[[str, int], dict[str, object]]) -> None:
    """Append the rows that the table lacks.

    Args:
        given: the parsed arguments.
        columns: of the table, among them `defence` and `seed`.
        row_of: the row of a defence and a seed.
    """
    done = set()
    if given.table.exists():
        done = {(row["defence"], int(row["seed"])) for row in csv.DictReader(given.table.open())}
    for seed in given.seeds:
        for name in given.defences:
            if (name, seed) in done:
                continue
            row = {"defence": name, "seed": seed, **row_of(name, seed)}
            print(row, flush=True)
            with given.table.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(columns))
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
