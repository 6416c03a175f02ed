"""The command `audit`: plan a study, run its cells, and write the report."""

import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import track

from attack_modules.audit.conclusions import Conclusions
from attack_modules.audit.forecast import Forecast, Work
from attack_modules.audit.readings import Reading
from attack_modules.audit.redaction import redacted, refuse_names, without_names
from attack_modules.audit.report import NO_JINJA2, Report
from attack_modules.audit.study import NO_DEFENCE, Cell, Defence, Scenario, Study
from attack_modules.audit.workers import CellRecord, Run, Workers, in_words, threads_each
from attack_modules.evaluation.finished_run import StrangersOf
from fl_lightning.errors import AuditError, MissingFile, SettingError, counted
from fl_lightning.memory import exceeds_memory

Check = Callable[[list[str]], Mapping[str, Any]]
"""Arguments of a command line -> the settings that it would run with, parsed and nested; raises AuditError."""
Trial = Callable[[list[str]], int | None]
"""Arguments of a command line -> bytes that its run takes beside the program, None if unknown; raises AuditError where
the run would be refused before its work."""
Changes = TypeVar("Changes", Scenario, Defence)
IMAGES = ("csv", "root")
"""Settings of `data` that say where images lie, the first of which that is given holds."""
UNITS = {"s": 1, "m": 60, "h": 3600}


def audit(
    run: Callable[[Path], Run],
    check: Check,
    trial: Trial,
    command: str,
    given: dict[str, str],
    title: str,
    scenarios: list[Scenario],
    base: list[Path],
    settings: dict[str, Any] | None = None,
    defences: list[Defence] | None = None,
    seeds: list[int] | None = None,
    out: Path = Path("runs/audit"),
    workers: int = 1,
    budget: str | None = None,
    dry_run: bool = False,
    retry: bool = False,
    report_only: bool = False,
    redact: bool = False,
    strangers: Path | None = None,
    observation: Path | None = None,
) -> str:
    """Run a study and write its report.

    Args:
        run: the study's folder -> what runs a cell.
        check: reads the settings of a cell, without running it.
        trial: makes what a cell's run makes before its work.
        command: that this is, for the report.
        given: settings for all runs that the command line names, which replace those of `settings`.
        title: of the report.
        scenarios: situations in which the attack is tried, the most telling first.
        base: configurations of `fit` that all runs begin with, in the order in which they are read.
        settings: for all runs, by dotted name: `trainer.max_steps: 100`.
        defences: the first is what the others are compared with; null for none.
        seeds: each combination is run with each seed; null for 0, 1 and 2.
        out: the study's folder; a command with the same folder goes on, also on another machine at the same time.
        workers: runs at once, each with its share of the processor's cores.
        budget: time after which no run is begun, such as 90s, 30m or 2h; null for no limit. The same command goes on.
        dry_run: only say what would be run, and how long it may take.
        retry: run again what failed.
        report_only: run nothing, and report what is there, also while other commands run.
        redact: leave originals, and names of files, classes and persons out of the report, for circulation. What the
            study itself says (title, names, descriptions) stays.
        strangers: folder of public images, `FOLDER/<class>/<name>`, with which reconstructions are compared; null for
            crops of the photographs in scikit-image and scikit-learn.
        observation: rounds of another system to attack, as of `fit`; null for those that are simulated.

    Returns:
        What was done, and where the report lies.

    Raises:
        AuditError: the study cannot be run, or the report cannot be written.
    """
    if workers < 1:
        raise SettingError(f"`workers` is {workers}, but at least 1 is needed.")
    seconds = None if budget is None else seconds_of(budget)
    if observation is not None and not observation.is_dir():
        raise MissingFile(f"There is no folder '{observation}'. Correct `--observation`.")
    if redact:
        for scenario in scenarios:
            refuse_names(scenario.grid, scenario.name)
    common, defences = {**(settings or {}), **given}, defences or [NO_DEFENCE]
    if observation is not None:
        common["observation"] = str(observation)
        kept = _of_the_past(defences) or [NO_DEFENCE]
        left_out = {defence.name for defence in defences} - {defence.name for defence in kept}
        scenarios = [_without(left_out, scenario) for scenario in _of_the_past(scenarios)]
        defences = kept
    study = Study(title, scenarios, base, common, defences, seeds or [0, 1, 2])
    out = out.resolve()
    cells = study.cells()
    parsed = _checked(cells, check)
    to_run = _open(cells, out, retry)
    refused, memory = ({}, None) if report_only else _tried(to_run, out, trial)
    if len(refused) == len(cells):
        raise SettingError(f"All runs would be refused. {cells[0].title}: {refused[cells[0].name]}")
    forecast = Forecast(out, cells, {cell.name: Work.of(parsed[_kind(cell)]) for cell in cells}, memory)
    print(_plan(study, cells, to_run, refused, forecast, out, workers), flush=True)
    if find_spec("jinja2") is None:
        print(f"Warning: {NO_JINJA2}", flush=True)
    if dry_run:
        return "Nothing was run, because of `--dry_run`."
    compared = StrangersOf(strangers)
    if strangers is not None:
        compared((3, 64, 64))  # a folder that cannot be read is refused now
    if retry and not report_only:
        for cell in to_run:
            if _failed(cell.folder(out)):
                (cell.folder(out) / "cell.json").unlink()

    def ended(cell: Cell) -> str:
        forecast.look([cell])
        record = CellRecord.load(cell.folder(out))
        return "done" if record is not None and record.status == "done" else f"failed: {record and record.sentence}"

    def report() -> str:
        readings, origins, made_by = _read(cells, out, compared), compared.origins, command
        if redact:
            readings, made_by = redacted(readings), shlex.join(without_names(shlex.split(command)))
            origins = origins if strangers is None else ["public images of a folder"]
        found = Conclusions.of(study, readings)
        done = sum(reading.status == "done" for reading in readings)
        said = "\n".join([*found.verdict(), f"{done} of {len(cells)} runs have a result."])
        try:
            path = Report(found, lambda reading: parsed.get(_kind(reading.cell)), origins, redact, made_by).write(out)
        except AuditError:
            print(said, flush=True)
            raise
        return f"{said} The report: {path}"

    try:
        if not report_only:
            program = run(out)

            def run_or_refuse(cell: Cell, *where: Any) -> tuple[int, str]:
                return (1, refused[cell.name]) if cell.name in refused else program(cell, *where)

            Workers(workers, run_or_refuse, out, forecast.seconds, seconds).work(cells, ended)
    except BaseException as error:  # what is there is reported, whatever ended the work
        if isinstance(error, KeyboardInterrupt):
            print("Interrupted. What ended is kept, and the same command goes on.", flush=True)
        try:
            print(report(), flush=True)
        except AuditError as second:
            print(f"The report could not be written: {second}", flush=True)
        raise
    if budget is not None and (later := len(_open(cells, out))):
        print(f"The budget of {budget} leaves {counted(later, 'run')} for later: the same command goes on.", flush=True)
    return report()


def seconds_of(budget: str) -> float:
    """A duration such as `30m` in seconds.

    Raises:
        SettingError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", budget)
    if not found or float(found[1]) <= 0:
        raise SettingError(f"`budget` is '{budget}', but must be a time such as 90s, 30m or 2h.")
    return float(found[1]) * UNITS[found[2]]


def _of_the_past(items: list[Changes]) -> list[Changes]:
    """Scenarios or defences that change the attack alone: the federation of rounds that were observed has happened."""
    kept = [item for item in items if not item.configs and not any(map(_changes_federation, _keys(item)))]
    if left_out := [item.name for item in items if item not in kept]:
        print(f"Left out, as the observed rounds have happened: {', '.join(left_out)}.", flush=True)
    return kept


def _without(left_out: Collection[str], scenario: Scenario) -> Scenario:
    """A scenario that does not name these defences."""
    if scenario.defences is None:
        return scenario
    return replace(scenario, defences=[name for name in scenario.defences if name not in left_out])


def _keys(item: Scenario | Defence) -> list[str]:
    return [*item.settings, *(item.grid if isinstance(item, Scenario) else ())]


def _changes_federation(key: str) -> bool:
    return key.startswith(("data.", "federation.")) and not key.startswith("federation.model")


def _kind(cell: Cell) -> tuple[str, str]:
    """Cells that differ in their seed alone have the same settings."""
    return cell.scenario.name, cell.defence.name


def _checked(cells: Sequence[Cell], check: Check) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The parsed settings of all kinds of cells.

    Raises:
        SettingError: those of one cannot be read; it names the scenario and the defence.
    """
    first: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        first.setdefault(_kind(cell), cell)
    parsed = {}
    for kind, cell in track(list(first.items()), "Reading settings", transient=True):
        try:
            parsed[kind] = check(["fit", *cell.arguments])
        except AuditError as error:
            where = f"Scenario '{cell.scenario.name}', defence '{cell.defence.name}': "
            raise SettingError(where + str(error)[: 400 - len(where)]) from error
        data = (parsed[kind].get("data") or {}).get("init_args") or {}
        source = next(filter(None, (data.get(name) for name in IMAGES)), None)
        if cell.federation is not None and source is not None and not Path(str(source)).exists():
            raise MissingFile(
                f"There are no images '{source}', which the scenario '{cell.scenario.name}' needs. Give "
                "`--data.root FOLDER`, or `--data.csv FILE` for your own."
            )
    return parsed


def _open(cells: Sequence[Cell], out: Path, retry: bool = False) -> list[Cell]:
    """Those that have not ended, and with `retry` those that failed."""
    return [
        cell for cell in cells if not (cell.folder(out) / "cell.json").exists() or (retry and _failed(cell.folder(out)))
    ]


def _failed(folder: Path) -> bool:
    record = CellRecord.load(folder)
    return record is not None and record.status == "failed"


def _tried(cells: Sequence[Cell], out: Path, trial: Trial) -> tuple[dict[str, str], int | None]:
    """Try what cells make before their work: by the first seed of each kind, and by all seeds where that is refused.

    Returns:
        The refused cells' names with the reason, and the bytes that one of the others takes at most beside the program
        (None if that is not known of any).
    """
    refused: dict[str, str] = {}
    accepted, known = set(), []
    for cell in track(cells, "Trying settings", transient=True):
        if _kind(cell) in accepted:
            continue
        try:
            known.append(trial(["fit", *cell.placed(out)]))
            accepted.add(_kind(cell))
        except AuditError as error:
            refused[cell.name] = str(error)
    return refused, max(filter(None, known), default=None)


def _plan(
    study: Study,
    cells: Sequence[Cell],
    to_run: Sequence[Cell],
    refused: Mapping[str, str],
    forecast: Forecast,
    out: Path,
    workers: int,
) -> str:
    """What will be run, and how long it may take."""
    open_ = [cell for cell in to_run if cell.name not in refused]
    times = [forecast.seconds(cell) for cell in open_]
    known = [seconds for seconds in times if seconds is not None]
    megabytes, source = forecast.memory()
    lines = [
        f"Study: {study.title}",
        f"{counted(len(study.expanded()), 'scenario')}, {counted(len(study.defences), 'defence')}, "
        f"{counted(len(study.seeds), 'seed')}: {counted(len(cells), 'run')}, "
        f"{len(cells) - len(to_run)} of which have ended. Folder: {out}",
        *(f"Refused, and not run: {cell.title}: {refused[cell.name]}" for cell in to_run if cell.name in refused),
    ]
    if known:
        rough = "" if len(to_run) < len(cells) else ", roughly, as none has ended yet"
        missing = len(times) - len(known)
        unknown = f", and {counted(missing, 'run')} of which nothing is known" if missing else ""
        lines.append(
            f"Time: about {in_words(sum(known) / workers)} with {counted(workers, 'worker')} of "
            f"{counted(threads_each(workers), 'thread')}{rough}{unknown}; the longest run {in_words(max(known))}."
        )
    elif times:
        lines.append("Time: unknown until the first run has ended.")
    lines.append(f"Memory: about {workers * megabytes / 1024:.1f} GB ({source}).")
    if excess := exceeds_memory(workers * megabytes * 2**20):
        lines.append(f"Warning: that is {excess}. Lower `--workers`.")
    return "\n".join(lines)


def _read(cells: Sequence[Cell], out: Path, compared: StrangersOf) -> list[Reading]:
    """All cells; pictures of the first one of each scenario and defence that has a result."""
    found, pictured = [], set()
    for cell in track(cells, "Reading results", transient=True):
        reading = Reading.of(cell, out, compared, _kind(cell) not in pictured)
        if reading.worst:
            pictured.add(_kind(cell))
        found.append(reading)
    return found
