"""The command `audit`: its settings."""

from argparse import ArgumentError
from collections.abc import Callable
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from fl_lightning.command_line.given import UsageError

PURPOSE = "Run a study of many attacks, and write one report: report.html, report.json, cells.csv."
SECTIONS = ("data", "federation", "knowledge", "model", "postprocess", "trainer")
"""Settings of `fit` begin with one of these; on the command line of an audit they hold for all of its runs."""
SWITCHES = ("--dry_run", "--retry", "--redact")
"""Settings that are true where they have no value."""


def audit_parser(audit: Callable[..., Any]) -> ArgumentParser:
    """The command's parser: the arguments of `audit` but for the programs that it uses."""
    parser = ArgumentParser(prog="python cli.py audit", description=PURPOSE, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="The study, see configs/audit_demo.yaml.")
    parser.add_function_arguments(audit, skip={"run", "check", "given"}, fail_untyped=True)
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
    try:
        own, given = _of_fit(_with_values(args))
        settings = parser.instantiate_classes(parser.parse_args(own))
    except ArgumentError as error:
        shown = " ".join(line.strip(" -") for line in str(error).splitlines() if line.strip())
        raise UsageError(f"{shown[:300].rstrip('.')}. `python cli.py audit --help` lists all settings.") from error
    arguments = {name: value for name, value in vars(settings).items() if name != "config"}
    return audit(**programs, given=given, **arguments)


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


def _with_values(args: list[str]) -> list[str]:
    """A switch without a value is true."""
    followed = [*args[1:], "--"]
    return [
        f"{arg}=true" if arg in SWITCHES and after.startswith("--") else arg
        for arg, after in zip(args, followed, strict=True)
    ]
