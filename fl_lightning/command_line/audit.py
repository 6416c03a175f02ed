"""The command `audit`: its settings."""

import shlex
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from fl_lightning.command_line.given import UsageError, settings_in
from fl_lightning.errors import in_short

PURPOSE = "Run a study of many attacks, and write one report: report.html, report.json, cells.csv."
SECTIONS = ("data", "federation", "knowledge", "model", "postprocess", "trainer")
"""Settings of `fit` begin with one of these; on the command line of an audit they hold for all of its runs."""


def audit_parser(audit: Callable[..., Any]) -> ArgumentParser:
    """The command's parser: the arguments of `audit` but for the programs that it uses."""
    parser = ArgumentParser(prog="python cli.py audit", description=PURPOSE, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="The study, see configs/audit_demo.yaml.")
    parser.add_function_arguments(audit, skip={"run", "check", "trial", "command", "given"}, fail_untyped=True)
    return parser


def run_audit(audit: Callable[..., Any], args: list[str], **programs: Callable[..., Any]) -> Any:
    """Run the command.

    Args:
        audit: does the work, see `attack_modules.audit.audit`.
        args: of the command line, after `audit`.
        programs: passed to `audit` as they are.

    Raises:
        UsageError: the command line or the study cannot be read.
    """
    parser = audit_parser(audit)
    _refuse_unknown(audit, args)
    try:
        own, given = _of_fit(_with_values(audit, args))
        settings = parser.instantiate_classes(parser.parse_args(own))
    except ArgumentError as error:
        shown = " ".join(line.strip(" -") for line in str(error).splitlines() if line.strip())
        raise UsageError(f"{shown[:300].rstrip('.')}. `python cli.py audit --help` lists all settings.") from error
    arguments = {name: value for name, value in vars(settings).items() if name != "config"}
    return audit(**programs, command=shlex.join(["python", "cli.py", "audit", *args]), given=given, **arguments)


def _of_fit(args: list[str]) -> tuple[list[str], dict[str, str]]:
    """The audit's own arguments, and those of `fit` by their dotted names."""
    own, given, words = [], {}, iter(args)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name.partition(".")[0] in SECTIONS:
            following = value if equals else next(words, None)
            if following is None:
                raise UsageError(f"`{word}` has no value. Write `{word} VALUE`.")
            given[name] = following
        else:
            own.append(word)
    return own, given


def _refuse_unknown(audit: Callable[..., Any], args: list[str]) -> None:
    """Refuse misspelt settings in lists of dataclasses, which jsonargparse would drop without a word."""
    study: dict[str, Any] = {}
    for option, value in pairwise([word for arg in args for word in arg.split("=", 1)]):
        if option == "--config":
            study |= settings_in(value)
        elif option.startswith("--") and value.startswith("["):
            try:
                study[option.removeprefix("--")] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UsageError(
                    f"`{option}` is no list in YAML ({in_short(error)}). Close its brackets and quotes, or give it "
                    "in a file: `--config FILE`."
                ) from error
    for name, kind in get_type_hints(audit).items():
        listed = [inner for part in (kind, *get_args(kind)) if get_origin(part) is list for inner in get_args(part)]
        items = study.get(name) if listed and is_dataclass(listed[0]) else None
        for item in items if isinstance(items, list) else []:  # the parser refuses what is no list
            allowed = [field.name for field in fields(listed[0])]
            unknown = [key for key in item if key not in allowed] if isinstance(item, dict) else [str(item)]
            if unknown:
                nearest = [f" Did you mean `{found}`?" for found in get_close_matches(unknown[0], allowed, n=1)]
                raise UsageError(
                    f"An item of `{name}` has no setting `{unknown[0]}`.{''.join(nearest)} It has {', '.join(allowed)}."
                )


def _with_values(audit: Callable[..., Any], args: list[str]) -> list[str]:
    """A switch without a value is true."""
    switches = [f"--{name}" for name, kind in get_type_hints(audit).items() if kind is bool]
    followed = [*args[1:], "--"]
    return [
        f"{arg}=true" if arg in switches and after.startswith("--") else arg
        for arg, after in zip(args, followed, strict=True)
    ]
