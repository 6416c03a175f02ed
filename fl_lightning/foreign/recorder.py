"""A recorder for a running client of any system: what it receives and sends, kept as plain model files."""

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fl_lightning.errors import SettingError, in_short
from fl_lightning.storage import StorageError, has_record, read_json, save_record

VERSION = 1
ABANDONED = 3600
"""Seconds after which a temporary file is taken for one of a process that was killed while writing it."""

NAME = re.compile(r"(global|own)_\d+\.(json|safetensors)")

AnyState = nn.Module | Mapping[str, Tensor | np.ndarray] | Sequence[Tensor | np.ndarray]
"""A model, its tensors or arrays by name, or nameless in the order of its state dict."""

log = logging.getLogger(__name__)


class Recorder:
    """Keeps the last rounds that a running client takes part in, and never disturbs its training.

    Whatever goes wrong while recording (a full disk, a folder that is not writable, a state that is none) is logged as
    one warning, and the training goes on. Files are written atomically, so a client that is killed leaves none that is
    cut short. `python cli.py observe --recorded DIRECTORY` makes a record of them that attacks read; each
    `.safetensors` is also a model file by itself.

    A model that differs from what another run left in the folder for the same round begins the folder anew: models of
    two runs are never taken for two models of one.

    Args:
        directory: where files are written; one for each client.
        keep: number of rounds that stay on disk, the last ones; each takes two models.

    Raises:
        SettingError: `keep` is below 1.
    """

    def __init__(self, directory: Path | str, keep: int = 10) -> None:
        if keep < 1:
            raise SettingError(f"`keep` is {keep}, so no round would stay on disk. Give the number of rounds to keep.")
        self.directory = Path(directory)
        self.keep = keep
        self._warned = False
        self._current: set[Path] = set()  # what is known to be of this run

    def global_model(self, state: AnyState, round: int) -> None:
        """Keep the global model `w_t` with which round `t` begins: the aggregate of round `t - 1`.

        Args:
            state: the model as it was received.
            round: `t`, from 0. A model that arrives at the end of round `t` is that of round `t + 1`.
        """
        with self.harmless(f"the global model of round {round}"):
            stem, tensors = self._stem("global", round), _tensors(state)
            if has_record(stem) and not _holds(stem, tensors):
                log.warning("'%s' holds round %d of another run: its files are removed.", self.directory, round)
                self._remove(_stems(self.directory) - self._current)
            if not has_record(stem):
                self._save(stem, tensors, {"round": round})
            self._current.add(stem)
            self._limit()

    def own_model(
        self, state: AnyState, round: int, weight: float | None = None, num_examples: int | None = None
    ) -> None:
        """Keep the client's own model after its training in a round.

        Args:
            state: the model as it is sent to the server.
            round: of the training, as of `global_model`.
            weight: the client's share of all examples of the round, if it is known.
            num_examples: the number of its own examples.
        """
        with self.harmless(f"the own model of round {round}"):
            self._save_own(_tensors(state), round, weight, num_examples)

    def own_update(
        self, update: AnyState, round: int, weight: float | None = None, num_examples: int | None = None
    ) -> None:
        """Keep what a client sends that sends an update: parameters before minus after its training.

        The round's `global_model` must have been recorded before. A system whose clients send deltas (after minus
        before) needs their negative.

        Args:
            update: before minus after, of all parameters or of those that were trained.
            round: of the training, as of `global_model`.
            weight: the client's share of all examples of the round, if it is known.
            num_examples: the number of its own examples.
        """
        with self.harmless(f"the own update of round {round}"):
            before, terms = _load(self._stem("global", round)), _tensors(update)
            if strange := terms.keys() - before.keys():
                raise ValueError(f"its names {sorted(strange)[:3]} are not those of the global model")
            own = before | {name: (before[name].double() - term).to(before[name]) for name, term in terms.items()}
            self._save_own(own, round, weight, num_examples)

    def _save_own(self, tensors: dict[str, Tensor], round: int, weight: float | None, num_examples: int | None) -> None:
        stem = self._stem("own", round)
        self._save(stem, tensors, {"round": round, "weight": weight, "num_examples": num_examples})
        self._current.add(stem)
        self._limit()

    def _save(self, stem: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if not tensors:
            raise ValueError("it holds no tensors")
        save_record(stem, tensors, {"version": VERSION, **facts})

    def _stem(self, kind: str, round: int) -> Path:
        return self.directory / f"{kind}_{int(round):04d}"

    def _remove(self, stems: set[Path]) -> None:
        for stem in stems:
            stem.with_suffix(".json").unlink(missing_ok=True)  # first: tensors without it are no record
            stem.with_suffix(".safetensors").unlink(missing_ok=True)

    def _limit(self) -> None:
        """Leave the last rounds, `keep` of them with the model that follows each."""
        stems = _stems(self.directory)
        models = sorted(_round_of(stem) for stem in stems if stem.name.startswith("global"))
        if len(models) > self.keep:
            oldest = models[-self.keep - 1]
            self._remove({stem for stem in stems if _round_of(stem) < oldest})
        for path in self.directory.glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink(missing_ok=True)

    @contextmanager
    def harmless(self, what: str) -> Iterator[None]:
        """Turn an error into a warning, the recorder's first one."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                self._warned = True
                log.warning("%s is not recorded, and training goes on: %s", what.capitalize(), in_short(error))


@dataclass(frozen=True)
class RecordedRound:
    """Files of a round of which both global models were recorded.

    Attributes:
        round: its number, from 0.
        before: model file of `w_t`.
        after: model file of `w_{t+1}`.
        own: model file of the client's own model; None if it did not train.
        own_weight: the client's share of all examples, if it was recorded.
        num_examples: the client's own examples, if they were recorded.
    """

    round: int
    before: Path
    after: Path
    own: Path | None = None
    own_weight: float | None = None
    num_examples: int | None = None


def recorded_rounds(directory: Path) -> list[RecordedRound]:
    """The rounds in a `Recorder`'s folder, oldest first: pairs of consecutive global models.

    Raises:
        StorageError: there is none, or a file is damaged.
    """
    models = {_round_of(s): s for s in _stems(directory) if s.name.startswith("global") and has_record(s)}
    found = [_recorded_round(models[t], models[t + 1]) for t in sorted(models) if t + 1 in models]
    if not found:
        received = ", ".join(map(str, sorted(models))) or "none"
        raise StorageError(
            f"'{directory}' holds no two consecutive global models (those of round {received[:100]} are there), so no "
            "round was observed. Record further rounds; a client that is not sampled each time needs the models that "
            "are sent for evaluation."
        )
    return found


def _recorded_round(before: Path, after: Path) -> RecordedRound:
    round_ = _round_of(before)
    own = before.with_name(f"own_{round_:04d}")
    files = before.with_suffix(".safetensors"), after.with_suffix(".safetensors")
    if not has_record(own):
        return RecordedRound(round_, *files)
    facts = read_json(own.with_suffix(".json"))
    return RecordedRound(
        round_, *files, own.with_suffix(".safetensors"), facts.get("weight"), facts.get("num_examples")
    )


def _stems(directory: Path) -> set[Path]:
    """What a recorder wrote, complete or not, without the files' suffixes."""
    return {path.with_suffix("") for path in directory.glob("*_*.*") if NAME.fullmatch(path.name)}


def _round_of(stem: Path) -> int:
    return int(stem.name.partition("_")[2])


def _tensors(state: AnyState) -> dict[str, Tensor]:
    """Copies on the CPU by name, of which none shares memory with another; nameless ones as numpy names them."""
    if isinstance(state, nn.Module):
        state = state.state_dict()
    items = state.items() if isinstance(state, Mapping) else ((f"arr_{i}", array) for i, array in enumerate(state))
    tensors = {name: array if isinstance(array, Tensor) else torch.tensor(np.asarray(array)) for name, array in items}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _load(stem: Path) -> dict[str, Tensor]:
    with safe_open(stem.with_suffix(".safetensors"), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary


def _holds(stem: Path, tensors: dict[str, Tensor]) -> bool:
    recorded = _load(stem)
    return recorded.keys() == tensors.keys() and all(torch.equal(recorded[n], t) for n, t in tensors.items())
