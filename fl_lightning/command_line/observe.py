"""The command `observe`: its settings, and those that a user may write in short."""

import inspect
import re
from argparse import ArgumentError
from collections.abc import Callable
from pydoc import locate
from typing import Any

from jsonargparse import ArgumentParser
from torch import nn

from fl_lightning.command_line.given import UsageError

PURPOSE = (
    "Make a record that `fit --observation` attacks from two consecutive global models of any federation, or from all "
    "that a recorder kept."
)


class _Parser(ArgumentParser):
    def format_help(self) -> str:
        """Without all of PyTorch's modules, which are known but no models."""
        return re.sub(r", known\s+subclasses:.*?\)", ")", super().format_help(), flags=re.DOTALL)


def observe_parser(record_round: Callable[..., Any]) -> ArgumentParser:
    """The command's parser: a model, and the arguments of `record_round` but for the model's."""
    parser = _Parser(prog="python cli.py observe", description=PURPOSE, exit_on_error=False)
    parser.add_subclass_arguments(
        nn.Module, "model", required=True, instantiate=False, help="The global model's class or function and arguments."
    )
    parser.add_function_arguments(record_round, skip={"model_class", "arguments"}, fail_untyped=True)
    return parser


def observe(record_round: Callable[..., Any], args: list[str]) -> Any:
    """Run the command.

    Args:
        record_round: does the work, see `attack_modules.threat_model.recorded`.
        args: of the command line, after `observe`.

    Raises:
        UsageError: the command line cannot be read.
    """
    try:
        settings = observe_parser(record_round).parse_args(_with_lists(args))
    except ArgumentError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        start = next((i for i, line in enumerate(lines) if line.startswith("Problem with given class_path")), 0)
        shown = " ".join(lines[start:])
        raise UsageError(
            f"{shown[:220].rstrip('.')}. `python cli.py observe --help` lists all settings; a class such as "
            "`mynet.Net` needs its file on the Python path."
        ) from error
    chosen = settings.pop("model")
    model_class, arguments = locate(chosen.class_path), chosen.get("init_args")
    named = {} if arguments is None else _named(model_class, arguments.as_dict())
    return record_round(model_class, named, **settings.as_dict())


def _named(model_class: Callable[..., nn.Module], arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments without functions and classes that are left at their default, which a record cannot hold.

    Raises:
        UsageError: one is set to another function or class.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(model_class).parameters.items()}
    named = {name: v for name, v in arguments.items() if not (callable(v) and v is defaults.get(name))}
    if unnamed := [name for name, value in named.items() if callable(value)]:
        raise UsageError(
            f"`model.init_args.{unnamed[0]}` is a function or a class, which a record cannot hold. Name a class of "
            "your own that is built with it."
        )
    return named


def _with_lists(args: list[str]) -> list[str]:
    """Numbers separated by commas, as `3,64,64`, are a list."""
    return [f"[{arg}]" if "," in arg and all(_is_number(part) for part in arg.split(",")) else arg for arg in args]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
