"""One sentence for what jsonargparse refuses, with the nearest names of what it would accept."""

import importlib
import re
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from jsonargparse import ArgumentParser
from torch import nn

from fl_lightning.command_line.given import Given, UsageError
from fl_lightning.command_line.types_in_words import any_of, classes, in_words, literals
from fl_lightning.models import WrappedClassifier

# What jsonargparse 4.53 says. A message of another form is shown as it is, in short.
KEY = re.compile(r'Parser key "([^"]+)"')
CLASS = re.compile(r"Problem with given class_path '([^']+)'")
FACTORY = re.compile(r"Type .* expects a function or a callable class: .*class_path='([^']+)'", re.DOTALL)
NO_COMMAND = re.compile(r'expected "subcommand" to be one of')
UNKNOWN_COMMAND = re.compile(r"argument subcommand: invalid choice: '([^']*)'")
UNKNOWN_ARGUMENTS = re.compile(r"unrecognized arguments: (.+)", re.DOTALL)
UNKNOWN_SETTING = re.compile(r"(?:Option|.* does not accept option) '([^']+)'")
UNKNOWN_CLASS = re.compile(
    r"(?:Expected a dot import path string: |Unexpected import path format: |Import path |Expected an instantiatable "
    r"class, but |Expected (?='))(\S+)"
)
NO_VALUE = re.compile(r"argument (\S+): expected (?:one|at least one) argument")
REQUIRED = re.compile(r"the following arguments are required: ([\w.]+)")
GROUP = re.compile(r"(?:Parser key \S+\s+)?Unable to load config")
NESTED = re.compile(r"NestedArg\(key='([^']+)'")
VALUE = re.compile(r"(?:Got value|Given value): (?:NestedArg\(key='[^']*', val=)?(.*?)\)?$", re.MULTILINE)


def explain(error: ArgumentError, parsers: Mapping[str, ArgumentParser], given: Given) -> UsageError:
    """Say in one sentence what a parser of the command line refused, and what it accepts.

    Args:
        error: raised by jsonargparse, with its causes.
        parsers: of each command.
        given: the command line and the configurations.
    """
    return UsageError(_Refusal(error, parsers, given).sentence())


class _Refusal:
    """What jsonargparse says of a setting, found in its message and in those of its causes."""

    def __init__(self, error: ArgumentError, parsers: Mapping[str, ArgumentParser], given: Given) -> None:
        self.given = given
        self.commands = [*parsers, "observe", "audit"]  # the last two have parsers of their own
        self.command = next((argument for argument in given.arguments if argument in parsers), "")
        self.settings = settings_of(parsers[self.command]) if self.command else {}
        self.help = f"`python cli.py {self.command or 'fit'} --help` lists all settings."
        self.messages: list[str] = []
        self.keys: list[str] = []  # of the setting, from the outside to the inside
        self.owner = ""  # import path of the class that has the last of them
        inside = True  # a class was named since the last key
        self.cause: BaseException = error
        while True:
            message = str(self.cause).strip()
            self.messages.append(message)
            if (found := KEY.match(message)) and inside:
                self.keys.append(found[1].removeprefix(f"{self.command}."))
                inside = False
            elif found := CLASS.match(message) or FACTORY.match(message):
                self.owner, inside = found[1], True
            if self.cause.__cause__ is None:
                break
            self.cause = self.cause.__cause__

    def sentence(self) -> str:
        leaf = self.messages[-1]
        nested = next(filter(None, map(NESTED.search, self.messages)), None)
        if nested and not self.owner:
            return self._no_class(nested)
        for pattern, explained in (
            (NO_COMMAND, self._no_command),
            (UNKNOWN_COMMAND, self._unknown_command),
            (UNKNOWN_ARGUMENTS, self._unknown_arguments),
            (UNKNOWN_SETTING, self._unknown_setting),
            (UNKNOWN_CLASS, self._unfit_value),
            (NO_VALUE, self._no_value),
            (REQUIRED, self._required),
            (GROUP, self._group),
        ):
            if found := pattern.match(leaf):
                return explained(found)
        values = [found for message in reversed(self.messages) if (found := VALUE.search(message))]
        path = self.owner or (values[0][1] if values else "")
        if isinstance(self.cause, ImportError | AttributeError) and path:
            return self._unknown_module(path, _plain(leaf))
        if values and self.keys:
            return self._unfit_value(values[0])
        return ": ".join(filter(None, [".".join(self.keys), _plain(leaf)])) + f". {self.help}"

    def _no_command(self, _: re.Match) -> str:
        return f"The command is missing. Begin with {any_of(self.commands)}, as in `python cli.py fit --config FILE`."

    def _unknown_command(self, found: re.Match) -> str:
        nearest, commands = _nearest(found[1], self.commands), any_of(self.commands, "and")
        return f"'{found[1]}' is no command.{nearest} The commands are {commands}."

    def _unknown_arguments(self, found: re.Match) -> str:
        unknown = next((word for word in found[1].split() if word.startswith("-")), None)
        if unknown is None:
            return f"'{_plain(found[1])}' belongs to no setting. Write `--NAME VALUE`. {self.help}"
        name = unknown.partition("=")[0].lstrip("-")
        settings = [*self.settings, *(key for keys in self.given.files.values() for key in keys)]
        return f"There is no setting `--{name}`.{_nearest(name, settings, '--') or f' {self.help}'}"

    def _unknown_setting(self, found: re.Match) -> str:
        name = found[1]
        key = ".".join([*self.keys, name])
        place = self.given.place(key)
        if not self.owner:
            return f"There is no setting `{key}`{place}.{_nearest(name, self.settings) or f' {self.help}'}"
        accepted = list(settings_of(parser_of(self.owner)))
        if not accepted and self.given.is_early(key):
            return f"`--{key}` stands before the `--config` that names its class. Write `--config FILE` first."
        nearest = _nearest(name, [*accepted, "init_args"]) or f" It has {any_of(accepted[:12], 'and') or 'none'}."
        return f"`{_last(self.owner)}` has no setting `{key}`{place}.{nearest}"

    def _no_class(self, found: re.Match) -> str:
        key = ".".join(self.keys)
        allowed = in_words(self._type())
        return (
            f"`{key}.{found[1]}` is a setting of a class, but `{key}` names no class yet. Give `--{key} CLASS` before "
            f"it{f'; it may be {allowed}' if allowed else ''}."
        )

    def _unknown_module(self, path: str, reason: str) -> str:
        key = ".".join(self.keys)
        nearest = _nearest(_last(path), classes(self._type()))
        return (
            f"`{key}` names {path}{self.given.place(key)}, which cannot be imported ({reason}). Correct the "
            f"name, or put its module on the Python path.{nearest}"
        )

    def _unfit_value(self, found: re.Match) -> str:
        key, value, expected = ".".join(self.keys), _plain(found[1].strip("'\"")), self._type()
        allowed = in_words(expected)
        fit = f"must be {allowed}" if allowed else "cannot be that"
        nearest = _wrapping(key, value, expected) or _nearest(value, [*classes(expected), *literals(expected)])
        return f"`{key}` is {value!r}{self.given.place(key)}, but {fit}.{nearest}"

    def _no_value(self, found: re.Match) -> str:
        bare = [word for word, after in pairwise([*self.given.arguments, "--"]) if after.startswith("--")]
        option = next((word for word in bare if word.startswith(found[1].rpartition("/")[2])), found[1])
        return f"`{option}` has no value. Write `{option} VALUE`."

    def _required(self, found: re.Match) -> str:
        key = ".".join([*self.keys, found[1].removeprefix(f"{self.command}.")])
        if self.owner:
            return f"`{_last(self.owner)}` needs `{key}`. Give it on the command line, or in the configuration."
        return f"`{key}` is not given. Add `--{key} VALUE`, or a configuration: `--config configs/demo.yaml`."

    def _group(self, _: re.Match) -> str:
        group = self.keys[0]
        first = next((key for key in self.settings if key.startswith(f"{group}.")), group)
        return f"`{group}` is a group of settings. Give one of them, such as `--{first}`, or a YAML file. {self.help}"

    def _type(self) -> Any:
        """The type of the setting that `keys` lead to; None if it is not found."""
        settings = settings_of(parser_of(self.owner)) if self.owner and len(self.keys) > 1 else self.settings
        return settings.get(self.keys[-1])


def settings_of(parser: ArgumentParser) -> dict[str, Any]:
    """Names of a parser's settings -> their types."""
    actions = [action for action in parser._actions if SUPPRESS not in (action.dest, action.default)]
    return {a.dest: getattr(a, "_typehint", None) or a.type for a in actions if a.dest not in ("help", "subcommand")}


def parser_of(class_path: str) -> ArgumentParser:
    """A parser of a class's settings; an empty one if the class cannot be imported."""
    parser = ArgumentParser(exit_on_error=False)
    module, _, name = class_path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return parser
    if isinstance(made, type):
        parser.add_class_arguments(made, fail_untyped=False)
    return parser


def _wrapping(key: str, value: str, expected: Any) -> str:
    """How a user's own module becomes a global model, where it was given as one; or nothing."""
    wrapper = WrappedClassifier.__name__
    module, _, name = value.rpartition(".")
    made = getattr(sys.modules.get(module), name, None)
    if wrapper not in classes(expected) or not (isinstance(made, type) and issubclass(made, nn.Module)):
        return ""
    return f" Any module that ends in linear layers is one in a wrapper: `--{key} {wrapper} --{key}.module {value}`."


def _nearest(name: str, accepted: Iterable[str], prefix: str = "") -> str:
    """` Did you mean ...?` with the accepted names that are most like a name, or nothing."""
    by_case = {other.lower(): other for other in accepted if other != name}
    same = [other for other in by_case.values() if _last(other) == _last(name)]
    close = [by_case[other] for other in get_close_matches(name.lower(), by_case, n=2)]
    found = list(dict.fromkeys([*same[:3], *close]))[:3]
    return f" Did you mean {any_of([f'`{prefix}{other}`' for other in found])}?" if found else ""


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _plain(text: str, most: int = 120) -> str:
    """A message in one line, types by their names, the middle left out if it is long."""
    text = " ".join(re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).split()).rstrip(".")
    return text if len(text) <= most else f"{text[: most - 30]} ... {text[-25:]}"
