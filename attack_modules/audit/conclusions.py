"""What the cells of a study say together: intervals over seeds, a verdict in words, and what to do."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from scipy.stats import binom, t

from attack_modules.audit.readings import COPY, Reading
from attack_modules.audit.study import Defence, Scenario, Study
from attack_modules.evaluation.persons import RECOGNISABLE
from fl_lightning.errors import counted

CONFIDENCE = 0.95
BY_CHANCE = 0.01
"""Probability below which so many leaked images are not taken for chance."""
FEWEST_SEEDS = 3
NO_PROOF = (
    "That no image was reconstructed says how hard this tool tried; it is no proof that nothing leaks, and other "
    "attacks may do better."
)

UNDECIDED = (
    "Whether they show these originals or any images of the kind is not decided: the originals are too alike, or the "
    "strangers compared with too unlike them."
)


@cache
def _quantile(freedom: int) -> float:
    """Of Student's distribution, for an interval on both sides."""
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        low: lower end of the 95 % confidence interval of the mean (Student's t) from three values on, else the least.
        high: likewise.
        count: number of values.
    """

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None], least: float = -math.inf, most: float = math.inf) -> "Interval | None":
        """Of the values that are known, limited to [least, most]; None if there are none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        mean, count = statistics.fmean(known), len(known)
        if count < FEWEST_SEEDS:
            return cls(mean, min(known), max(known), count)
        half = _quantile(count - 1) * statistics.stdev(known) / math.sqrt(count)
        return cls(mean, max(least, mean - half), min(most, mean + half), count)


@dataclass(frozen=True)
class Group:
    """The cells of one scenario with one defence: one for each seed."""

    scenario: Scenario
    defence: Defence
    readings: Sequence[Reading]

    @cached_property
    def done(self) -> list[Reading]:
        """Cells with a result."""
        return [reading for reading in self.readings if reading.status == "done"]

    @cached_property
    def compared(self) -> list[Reading]:
        """Cells whose images could be compared with originals."""
        return [reading for reading in self.done if reading.compared]

    @property
    def seat(self) -> str | None:
        """Who looked, in words; None where no result says it."""
        return next((reading.seat for reading in self.done), None)

    @property
    def images(self) -> int:
        """Originals of all cells."""
        return sum(len(reading.rows) for reading in self.compared)

    @property
    def leaked(self) -> int:
        """Leaked images of all cells."""
        return sum(reading.leaked for reading in self.compared)

    def share(self, of: Callable[[Reading], int | None]) -> Interval | None:
        """Share of a cell's images, over seeds."""
        cells = [(of(reading), len(reading.rows)) for reading in self.done]
        return Interval.of([n / size for n, size in cells if n is not None and size], 0.0, 1.0)

    @cached_property
    def leaked_share(self) -> Interval | None:
        """Share of the images that leaked, over seeds; None without originals."""
        return self.share(lambda reading: reading.leaked)

    @property
    def copied(self) -> float:
        """Share of the images of which there is a copy; NaN without originals."""
        share = self.share(lambda reading: reading.copies)
        return share.mean if share else math.nan

    @cached_property
    def above_chance(self) -> bool:
        """Whether more images leaked than chance explains (binomial, 1 %)."""
        if not self.images:
            return False
        chance = max(reading.chance for reading in self.compared)
        return bool(binom.sf(self.leaked - 1, self.images, chance) < BY_CHANCE)

    @property
    def undecided(self) -> int:
        """Recognisable images, where strangers cannot tell whether they show their own originals; else 0."""
        return 0 if self.above_chance else sum(reading.recognisable for reading in self.compared)

    @property
    def persons_seen(self) -> Interval | None:
        """Share of the persons of whom an image is recognisable, over seeds; None where the data names none."""
        return Interval.of(
            [reading.persons and reading.persons_seen / reading.persons for reading in self.done], 0.0, 1.0
        )

    @cached_property
    def accuracy(self) -> Interval | None:
        """Of the global model, over seeds."""
        return Interval.of([reading.accuracy and reading.accuracy[1] for reading in self.done], 0.0, 1.0)

    def mean_score(self, name: str) -> Interval | None:
        """A score of `results.json`, over seeds."""
        return Interval.of([reading.score(name) for reading in self.done])

    @property
    def title(self) -> str:
        """The group in words."""
        return f"{self.scenario.name}, defence: {self.defence.name}"

    @cached_property
    def severity(self) -> tuple[float, float, float]:
        """By which the worst group is found."""
        copies, psnr = self.share(lambda reading: reading.copies), self.mean_score("psnr_mean")
        return (
            self.leaked_share.mean if self.leaked_share else -1.0,
            copies.mean if copies else -1.0,
            psnr.mean if psnr else -math.inf,
        )


@dataclass(frozen=True)
class Action:
    """A recommendation with what speaks for it."""

    what: str
    evidence: str


@dataclass(frozen=True)
class Conclusions:
    """All cells of a study, in groups."""

    study: Study
    groups: Sequence[Group]

    @classmethod
    def of(cls, study: Study, readings: Sequence[Reading]) -> "Conclusions":
        """Put a study's readings in groups, in the order of the study."""
        by_place: dict[tuple[str, str], list[Reading]] = {}
        for reading in readings:
            by_place.setdefault((reading.cell.scenario.name, reading.cell.defence.name), []).append(reading)
        return cls(study, [Group(r[0].cell.scenario, r[0].cell.defence, r) for r in by_place.values()])

    @cached_property
    def readings(self) -> list[Reading]:
        """Of all groups."""
        return [reading for group in self.groups for reading in group.readings]

    @cached_property
    def worst(self) -> Group | None:
        """The group that leaks most; None where nothing could be compared with originals."""
        compared = [group for group in self.groups if group.compared]
        return max(compared, key=lambda group: group.severity, default=None)

    @cached_property
    def scenarios(self) -> list[Scenario]:
        """Of the study, one for each value of their grids."""
        return self.study.expanded()

    @cached_property
    def _undefended(self) -> dict[str, Group]:
        first = self.study.defences[0].name
        return {group.scenario.name: group for group in self.groups if group.defence.name == first}

    def undefended(self, scenario: Scenario) -> Group | None:
        """The group of a scenario that the defended ones are compared with: that of the study's first defence."""
        return self._undefended.get(scenario.name)

    def verdict(self) -> list[str]:
        """The answer in a few sentences, for a reader who reads nothing else."""
        done = [reading for reading in self.readings if reading.status == "done"]
        if not done:
            return ["No run of this study has a result, so nothing is concluded. The reasons stand below."]
        sentences = []
        worst = self.worst
        if worst is None:
            claimed, images = sum(r.claimed for r in done), sum(len(r.rows) for r in done)
            sentences.append(
                f"No originals were at hand, so nothing could be compared. The attack itself calls {claimed} of "
                f"{images} reconstructed images certain or likely."
            )
            if not claimed:
                sentences.append(NO_PROOF)
        elif worst.above_chance:
            copies = sum(reading.copies for reading in worst.compared)
            sentences.append(
                f"Images leak. In the worst setting that was tried ({worst.title}), {worst.seat or 'the attacker'} "
                f"reconstructed {worst.leaked} of {worst.images} images of the others so that each can be told from "
                f"all strangers compared with; {copies} of them are copies (PSNR of {COPY:.0f} dB or more)."
            )
            claimed = sum(reading.claimed for reading in worst.compared)
            sentences.append(
                f"Without any original, the attacker itself would call {claimed} of them certain or likely."
            )
        elif worst.undecided:
            sentences.append(
                f"In the worst setting that was tried ({worst.title}), {worst.undecided} of {worst.images} "
                f"reconstructions are as near to their originals as pictures that a person recognises "
                f"({RECOGNISABLE:.0f} dB or more). {UNDECIDED}"
            )
        else:
            sentences.append(
                f"No attack of this study reconstructed more images than chance explains ({worst.leaked} of "
                f"{worst.images} in the worst setting, {worst.title}). {NO_PROOF}"
            )
        sentences += self._of_defences()
        unfinished = len(self.readings) - len(done)
        if unfinished:
            sentences.append(
                f"{unfinished} of {len(self.readings)} runs have no result (failed, unreadable or not run); nothing is "
                "concluded from them."
            )
        return sentences

    def _of_defences(self) -> list[str]:
        """What each defence does over all scenarios, in a sentence each."""
        found = []
        for defence in self.study.defences[1:]:
            with_it = [g for g in self.groups if g.defence.name == defence.name and g.compared]
            if not with_it:
                continue
            still = [g for g in with_it if g.above_chance]
            leaked, images = sum(g.leaked for g in with_it), sum(g.images for g in with_it)
            if still:
                found.append(
                    f"With the defence '{defence.name}', {leaked} of {images} images still leaked, in {len(still)} of "
                    f"{len(with_it)} scenarios more than chance explains."
                )
            elif undecided := sum(g.undecided for g in with_it):
                found.append(
                    f"With the defence '{defence.name}', {undecided} of {images} images still came out with "
                    f"{RECOGNISABLE:.0f} dB or more. {UNDECIDED}"
                )
            else:
                found.append(
                    f"With the defence '{defence.name}', {leaked} of {images} images leaked, no more than chance "
                    f"explains: the attacks of this study failed there, which is no proof of protection."
                )
        return found

    def failures(self) -> list[tuple[str, str]]:
        """What was tried and failed: groups without leaked images beyond chance, each with the attack's own words."""
        found = []
        for group in self.groups:
            if group.compared and not group.above_chance:
                attacks = sorted({str(reading.results.get("attack")) for reading in group.done})
                reasons = {
                    reason for r in group.done for reason in (r.results.get("verdict") or {}).get("reasons") or ()
                }
                because = f" The attack says: {'; '.join(sorted(reasons)[:4])}." if reasons else ""
                found.append(
                    (
                        group.title,
                        f"{', '.join(attacks)}: {group.leaked} of {group.images} images leaked, no more than chance "
                        f"explains.{because} {UNDECIDED if group.undecided else NO_PROOF}",
                    )
                )
        for reading in self.readings:
            if reading.status in ("failed", "unreadable"):
                found.append((reading.cell.title, f"{reading.status.capitalize()}: {reading.sentence}"))
        return found

    def comparisons(self) -> list[tuple[Group, Group, dict[str, tuple[str, str]]]]:
        """Pairs of undefended scenarios that differ only in what the attacker is told, with the items that differ.

        Each scenario is paired with the one before it from which it differs in the fewest items. The first of a pair is
        told more.
        """
        found = []
        alike: dict[str, dict[tuple, Group]] = {}  # the first group of each kind of knowledge, where all else is equal
        for scenario in self.scenarios:
            group = self.undefended(scenario)
            if group is None or not group.done:
                continue
            kinds = alike.setdefault(_but_told(scenario), {})
            pairs = [(other, _differing(other, group)) for other in kinds.values()]
            pairs = [(other, items) for other, items in pairs if items]
            kinds.setdefault(tuple(sorted(group.done[0].told.items())), group)
            if pairs:
                other, items = min(pairs, key=lambda pair: len(pair[1]))
                known = [sum(side == "known" for side in sides) for sides in zip(*items.values(), strict=True)]
                if known[0] < known[1]:
                    found.append((group, other, {item: pair[::-1] for item, pair in items.items()}))
                else:
                    found.append((other, group, items))
        return found

    def actions(self) -> list[Action]:
        """What to do, each with its evidence; a small set of rules, in the order of their weight."""
        rules = (self._stop, self._compare, self._defend, self._scenarios, self._labels, self._repeat, self._seeds)
        return [action for rule in rules for action in rule()]

    def _stop(self) -> list[Action]:
        worst = self.worst
        if worst is None or not worst.above_chance:
            return []
        return [
            Action(
                "Treat every participant as able to see the others' images in this setting, and tell those whose "
                "images they are, until a defence has been tried in it.",
                f"{worst.title}: {worst.leaked} of {worst.images} images leaked.",
            )
        ]

    def _compare(self) -> list[Action]:
        worst = self.worst
        if worst is None or not worst.undecided:
            return []
        return [
            Action(
                "Compare with public images of the same kind as yours: `--strangers FOLDER --report_only`. Until then, "
                "take the images for leaked.",
                f"{worst.title}: {worst.undecided} of {worst.images} came out with {RECOGNISABLE:.0f} dB or more.",
            )
        ]

    def _defend(self) -> list[Action]:
        """One for each defence and what is to be said of it, with the scenarios where that is so."""
        found: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for group in self.groups:
            plain = self.undefended(group.scenario)
            if plain is None or group is plain or not (group.compared and plain.compared and plain.above_chance):
                continue
            name, before, after = group.defence.name, plain.leaked_share, group.leaked_share
            if not group.above_chance:
                advice = (
                    f"Consider the defence '{name}'",
                    ", and audit it against an attacker who knows of it, unless this one did.",
                )
            elif after.mean < before.mean / 2:
                advice = f"The defence '{name}' alone is not enough", ": combine it with another."
            else:
                advice = f"Do not rely on '{name}'", "."
            cost = ""
            if plain.accuracy and group.accuracy:
                cost = f"; accuracy of the model {plain.accuracy.mean:.0%} and {group.accuracy.mean:.0%}"
            evidence = (
                f"leaked {before.mean:.0%} without and {after.mean:.0%} with it; copies {plain.copied:.0%} and "
                f"{group.copied:.0%}{cost}"
            )
            found.setdefault(advice, []).append((group.scenario.name, evidence))
        return [
            Action(
                f"{what} in {', '.join(repr(scenario) for scenario, _ in where)}{then}",
                " ".join(f"{scenario}: {evidence}." for scenario, evidence in where),
            )
            for (what, then), where in found.items()
        ]

    def _scenarios(self) -> list[Action]:
        worst = self.worst
        if worst is None or not worst.above_chance:
            return []
        found = []
        for scenario in self.scenarios:
            group = self.undefended(scenario)
            told_less = group is not None and _but_told(scenario) == _but_told(worst.scenario)
            if group is None or group is worst or told_less or not group.compared:
                continue
            if group.leaked_share.mean < worst.leaked_share.mean / 2:
                found.append(
                    Action(
                        f"Where the choice is yours, prefer the circumstances of '{scenario.name}'.",
                        f"{group.leaked} of {group.images} images leaked there, against {worst.leaked} of "
                        f"{worst.images} in '{worst.scenario.name}'.",
                    )
                )
        return found

    def _labels(self) -> list[Action]:
        inferred = [reading for reading in self.readings if reading.told.get("label_counts") == "inferred"]
        found = [score for reading in inferred if (score := reading.score("labels_found")) is not None]
        if not found or (mean := statistics.fmean(found)) < 0.5:
            return []
        return [
            Action(
                "Take the labels as known to every participant, and do not train on classes whose mere presence is a "
                "secret.",
                f"Without being told, the attacker read {mean:.0%} of the labels right, over {len(found)} runs.",
            )
        ]

    def _repeat(self) -> list[Action]:
        missing = [reading for reading in self.readings if reading.status != "done"]
        if not missing:
            return []
        failed = [reading for reading in missing if reading.status != "not run"]
        after = ", with `--retry` for what failed, after mending its cause" if failed else ""
        return [
            Action(
                f"Finish the study: run the same command again{after}.",
                f"{counted(len(failed), 'run')} failed or cannot be read, {len(missing) - len(failed)} not run.",
            )
        ]

    def _seeds(self) -> list[Action]:
        fewest = min((len(group.done) for group in self.groups if group.done), default=FEWEST_SEEDS)
        if fewest >= FEWEST_SEEDS:
            return []
        return [
            Action(
                f"Run at least {FEWEST_SEEDS} seeds before a number here is relied on.",
                f"Some settings have {counted(fewest, 'run')}, so their spread is not known.",
            )
        ]


def _but_told(scenario: Scenario) -> str:
    """What makes a scenario, without what the attacker is told."""
    settings = {key: value for key, value in scenario.settings.items() if not key.startswith("knowledge.")}
    return json.dumps([settings, scenario.base, scenario.configs], sort_keys=True, default=str)


def _differing(one: Group, other: Group) -> dict[str, tuple[str, str]]:
    """What the attacker is told differently in two groups, by item."""
    a, b = one.done[0].told, other.done[0].told
    return {item: (a[item], b[item]) for item in a if item in b and a[item] != b[item]}
