"""Whatever a user writes ends in a result, or in one sentence: random settings, words and files, plausible and absurd.

`FUZZ_SEED=7 pytest -m slow tests/test_fuzz.py` draws other cases.
"""

import collections.abc
import os
import random
import shutil
import string
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

import attack_modules
from cli import AuditCLI, run
from fl_lightning.command_line.explanations import parser_of, settings_of
from fl_lightning.command_line.types_in_words import classes

SEED = int(os.environ.get("FUZZ_SEED", "0"))
MOST_CHARACTERS = 400

# A run of a second: two steps on images of two peers.
SMALL: dict[str, Any] = {
    "seed_everything": 0,
    "data": {
        "class_path": "Photographs",
        "init_args": {"num_clients": 3, "images_per_client": 1, "image_size": 8, "partition": "InOrder"},
    },
    "federation": {"model": "LeNet5", "client": {"lr": 0.01, "local_epochs": 2}},
    "knowledge": {"labels": "inferred", "num_clients": "inferred"},
    "model": {"class_path": "FeatureInversion", "init_args": {"lr": 0.1}},
    "trainer": {
        "max_epochs": 1,
        "max_steps": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "small"}},
    },
}
CLASSES = {"data": "fl_lightning.data.Photographs", "model": "attack_modules.FeatureInversion"}
ANYWHERE = [
    "abc",
    "",
    "null",
    "true",
    "-1",
    "0",
    "1e3",
    ".nan",
    "-.inf",
    "[]",
    "{}",
    "[1",
    "{a: 1}",
    "x" * 500,
    "é✓",
    "-",
]
OTHERWISE: dict[str, list[str]] = {
    # Values for which the general ones would start further processes, wait for other machines or take minutes.
    "trainer.devices": ["auto", "1", "0", "-1", "abc", "1000"],
    "trainer.num_nodes": ["1", "0", "-1", "abc"],
    "trainer.strategy": ["auto", "nonsense", "fsdp", "deepspeed", "dp"],
    "trainer.max_steps": ["1", "3", "0", "-1", "-2", "abc", "1.5", str(2**64)],
    "trainer.accelerator": ["cpu", "auto", "gpu", "tpu", "abc"],
    "trainer.logger": ["true", "false", "null", "CSVLogger", "WandbLogger", "DummyLogger", "Foo"],
    "trainer.callbacks": ["EarlyStopping", "Timer", "LearningRateMonitor", "abc", "[]",
                          "[{class_path: EarlyStopping, init_args: {monitor: loss}}]", "[{class_path: Timer}]"],
    "trainer.profiler": ["simple", "abc"],
    "postprocess": ["none", "direct", "gan", "dirct", "DirectEnhancement", "Restoration", "GAN", "abc"],
    "data.num_clients": ["2", "4", "1", "0", "-1", "17", "abc"],
    "data.image_size": ["8", "9", "16", "7", "0", "-1", "100000", "abc"],
    "data.csv": ["nothere.csv", "afile", "good.csv", "damaged.csv"],
    "federation.model": ["LeNet5", "ResNet9", "VGG7", "LeNet6", "TorchvisionClassifier", "torch.nn.Linear", "abc"],
}  # fmt: skip
NUMBERS = {int: ["1", "2", "3", "0", "-1", str(2**64), "1.5"], float: ["0.5", "1", "0", "-1", "1e-30", "1e30", "1e400"]}
Sweep = Callable[[range], tuple[dict[str, int], list[str]]]
PATHS = ["afile", "afile/below", "new/folder", os.devnull, ".", ""]


def values(kind: Any) -> list[str]:
    """Plausible and absurd values of a setting's type, as on the command line."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return [value for part in arguments for value in values(part)]
    if origin is typing.Literal:
        return [str(value) for value in arguments]
    if kind in NUMBERS:
        return NUMBERS[kind]
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable) and arguments:
        inner = values(arguments[0])
        return [f"[{value}]" for value in inner] + [f"[{value}, {inner[0]}]" for value in inner]
    if isinstance(kind, type) and issubclass(kind, str | os.PathLike):
        return PATHS
    return classes(kind) or ["true", "false"]


def misspelt(word: str, chance: random.Random) -> str:
    """A word with two letters swapped, one left out, or one put in."""
    place = chance.randrange(max(len(word) - 1, 1))
    swapped = word[:place] + word[place + 1 : place + 2] + word[place : place + 1] + word[place + 2 :]
    other = word[:place] + chance.choice(string.ascii_letters + " .:") + word[place:]
    return chance.choice([swapped, word[:place] + word[place + 1 :], other])


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Content that is cut short, has bytes replaced, lines left out or exchanged, or is something else altogether."""
    place = chance.randrange(max(len(content), 1))
    lines = content.splitlines(keepends=True)
    shuffled = chance.sample(lines, len(lines))
    noise = chance.randbytes(chance.choice([1, 5, 50]))
    return chance.choice(
        [content[:place], content[:place] + noise + content[place + len(noise) :], b"".join(lines[1:]),
         b"".join(shuffled), b"", b"text\n", noise, content.replace(b",", b";"), content.replace(b": ", b":"),
         content.replace(b"\n", b"\r\n"), content.decode("latin-1").encode("utf-16"), content * 2]
    )  # fmt: skip


class Cases:
    """Draws commands, with the files that they need in the working directory.

    Args:
        settings: name -> type of every setting of a run.
        made: a folder with the record and the checkpoint of a finished run.
    """

    def __init__(self, settings: dict[str, Any], made: Path) -> None:
        self.settings = settings
        self.made = made

    def draw(self, chance: random.Random) -> list[str]:
        shutil.copytree(self.made, ".", dirs_exist_ok=True)
        command = chance.choices(["fit", "federate", "test", "validate", "predict", "fti"], [12, 2, 1, 1, 1, 1])[0]
        arguments = [command, "--config", "small.yaml"]
        for _ in range(chance.choice([1, 1, 2, 3])):
            kinds = [self.value, self.word, self.configuration, self.table, self.checkpoint, self.record]
            arguments += chance.choices(kinds, [10, 3, 2, 1, 1, 1])[0](chance)
        return arguments

    def value(self, chance: random.Random) -> list[str]:
        name = chance.choice(list(self.settings))
        return [
            f"--{name}",
            chance.choice(OTHERWISE.get(name) or [*values(self.settings[name]), chance.choice(ANYWHERE)]),
        ]

    def word(self, chance: random.Random) -> list[str]:
        name = chance.choice(list(self.settings))
        known = chance.choice(OTHERWISE.get(name) or values(self.settings[name]))
        wrong = misspelt(known, chance) if known.isalpha() else f"{known}x"  # not another number: it may take hours
        return chance.choice([[f"--{misspelt(name, chance)}", known], [f"--{name}", wrong], [f"--{name}"], [known]])

    def configuration(self, chance: random.Random) -> list[str]:
        text = yaml.safe_dump(SMALL).encode()
        changed = chance.choice([damaged(text, chance), misspelt(text.decode(), chance).encode()])
        Path("damaged.yaml").write_bytes(changed)
        return ["--config", chance.choice(["damaged.yaml", "damaged.yaml", "nothere.yaml", ".", "small.yml"])]

    def table(self, chance: random.Random) -> list[str]:
        Path("damaged.csv").write_bytes(damaged(Path("good.csv").read_bytes(), chance))
        return ["--data.csv", chance.choice(["damaged.csv", "good.csv"])]

    def checkpoint(self, chance: random.Random) -> list[str]:
        Path("damaged.ckpt").write_bytes(damaged(Path("last.ckpt").read_bytes(), chance))
        others = ["last.ckpt", "record/federation.ckpt", "small.yaml", "nothere.ckpt", "best", "last"]
        return ["--ckpt_path", chance.choice(["damaged.ckpt", *others])]

    def record(self, chance: random.Random) -> list[str]:
        path = chance.choice([path for path in sorted(Path("record").rglob("*")) if path.is_file()])
        content = path.read_bytes()
        chance.choice([lambda: path.write_bytes(damaged(content, chance)), path.unlink])()
        if chance.random() < 0.3:  # a record of another system
            Path("record/settings.json").unlink(missing_ok=True)
        return ["--observation", chance.choice(["record", "record", "record/observed", "afile"])]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    attack_modules.load_all()
    parser = LightningArgumentParser(exit_on_error=False)
    AuditCLI.add_core_arguments_to_parser(None, parser)
    AuditCLI.add_arguments_to_parser(None, parser)
    settings = {name: kind for name, kind in settings_of(parser).items() if kind is not None} | {"seed_everything": int}
    for group, path in CLASSES.items():
        settings |= {f"{group}.{name}": kind for name, kind in settings_of(parser_of(path)).items()}
    made = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        Path("small.yaml").write_text(yaml.safe_dump(SMALL))
        assert run(["fit", "--config", "small.yaml", "--observation", "record"]) == 0
        Path("runs/small/version_0/checkpoints/last.ckpt").rename("last.ckpt")
        shutil.move("runs/small/version_0/images", "photos")
        shutil.rmtree("runs")
        Path("afile").write_text("text")
        rows = [f"photos/{number:03d}.png,{label},{client}" for number, label, client in ((0, "cat", 0), (1, "dog", 1))]
        Path("good.csv").write_text("\n".join(["path,label,client", *rows]) + "\n")
    return Cases(settings, made)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Undo what `trainer.deterministic`, `.benchmark` and `.detect_anomaly` set for the whole process."""
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    torch.autograd.set_detect_anomaly(False)


@pytest.fixture
def sweep(cases: Cases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sweep:
    """Run cases by their numbers, each in a folder of its own, and count how they end."""

    def ending(arguments: list[str]) -> str:
        try:
            status = run(arguments)
        except SystemExit as error:
            status = error.code
        except Exception:
            return f"traceback: {traceback.format_exc()[-2500:]}"
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("Error: ")]
        if status == 0:
            return "result" if not errors else f"success with an error: {errors}"
        if status not in (1, 2) or len(errors) != 1 or not printed.err.rstrip().endswith(errors[0]):
            return f"status {status} without one sentence: {printed.err[-800:]}"
        length = len(errors[0].removeprefix("Error: "))
        return f"sentence {status}" if length <= MOST_CHARACTERS else f"{length} characters: {errors[0]}"

    def run_all(numbers: range) -> tuple[dict[str, int], list[str]]:
        ends, faults = collections.Counter(), []
        for number in numbers:
            folder = tmp_path / str(number)
            folder.mkdir()
            monkeypatch.chdir(folder)
            arguments = cases.draw(random.Random(f"{SEED} {number}"))
            end = ending(arguments)
            if end not in ("result", "sentence 1", "sentence 2"):
                faults.append(f"{number}: {' '.join(arguments)}\n{end}\n")
                end = "fault"
            ends[end] += 1
            monkeypatch.chdir(tmp_path)
            shutil.rmtree(folder)
        with capsys.disabled():
            print(f" seed {SEED}: {dict(ends)}", end="", flush=True)
        return ends, faults

    return run_all


def test_some_commands_end_in_a_result_or_one_sentence(sweep: Sweep) -> None:
    ends, faults = sweep(range(12))
    assert not faults, "\n".join(faults)
    assert ends["result"] and ends["sentence 1"] and ends["sentence 2"]  # else it tries too little


@pytest.mark.slow
def test_many_commands_end_in_a_result_or_one_sentence(sweep: Sweep) -> None:
    _, faults = sweep(range(12, 312))
    assert not faults, "\n".join(faults)
