"""The command `audit`: its settings."""

from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from fl_lightning.command_line.given import UsageError

PURPOSE = "Run a study of many attacks, and write one report: report.html, report.json, cells.csv."
SWITCHES = ("--dry_run", "--retry", "--redact")
"""Settings that are true where they have no value."""


def audit_parser(audit: Callable[..., Any]) -> ArgumentParser:
    """The command's parser: the arguments of `audit` but for the programs that it uses."""
    parser = ArgumentParser(prog="python cli.py audit", description=PURPOSE, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="The study, see configs/audit_demo.yaml.")
    parser.add_function_arguments(audit, skip={"run", "check", "csv"}, fail_untyped=True)
    parser.add_argument("--data.csv", type=Path | None, default=None, help="Your own images, as `data.csv` of `fit`.")
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
        settings = parser.parse_args(_with_values(args))
        settings = parser.instantiate_classes(settings)
    except ArgumentError as error:
        shown = " ".join(line.strip(" -") for line in str(error).splitlines() if line.strip())
        raise UsageError(f"{shown[:300].rstrip('.')}. `python cli.py audit --help` lists all settings.") from error
    given = {name: value for name, value in vars(settings).items() if name not in ("config", "data")}
    return audit(**programs, **given, csv=settings.data.csv)


def _with_values(args: list[str]) -> list[str]:
    """A switch without a value is true."""
    followed = [*args[1:], "--"]
    return [
        f"{arg}=true" if arg in SWITCHES and after.startswith("--") else arg
        for arg, after in zip(args, followed, strict=True)
    ]
