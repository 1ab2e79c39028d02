"""Commands from configuration classes: one flag per option, one meaning of exit codes, one JSON object under --json.

    cli = command_group("Low-rank optimizers.")

    @cli.command()
    @configured(TrainConfig)
    def train(config: TrainConfig) -> dict[str, Any]:
        ...                                     # what it returns is what --json prints

Imports no torch, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import math
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import click

from lm_core.config import Leaf, Mistakes, build, find, leaves, load, merge, parse, to_dict, to_yaml, wrong_values
from lm_core.errors import ConfigError, UserError
from lm_core.flags import Spelled, split
from lm_core.values import bounds, metavar, takes_text, without_none

logger = logging.getLogger(__name__)
_OWN = ("--set", "--json", "--quiet", "--print-config", "--help", "--config-file")
_SPLIT = "lm_core.cli.split"


class _ExitCodes(click.Command):
    """Run by an entry point, it turns errors into exit codes."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        inherited: Any = super().main
        if not standalone_mode:
            return inherited(*args, standalone_mode=False, **extra)
        sys.exit(_exit_code(lambda: inherited(*args, standalone_mode=False, **extra)))


class Command(_ExitCodes):
    """A command whose flags come from a configuration class (see `configured`); any click command otherwise."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        params = self.get_params(ctx)
        found = split(
            args,
            options=[param.leaf for param in params if isinstance(param, Flag)],
            others=[param for param in params if isinstance(param, click.Option) and not isinstance(param, Flag)],
            positional=any(isinstance(param, click.Argument) for param in params),
            words=getattr(getattr(self.callback, "config_class", None), "words", None),
        )
        ctx.meta[_SPLIT] = found
        try:
            left = super().parse_args(ctx, found.rest)
        except click.UsageError as error:
            if found.mistakes:
                raise Mistakes([*found.mistakes, error.format_message()]) from None
            raise
        # a command without a configuration has nothing that would report these later
        if found.mistakes and not any(isinstance(param, Flag) for param in params):
            raise Mistakes(found.mistakes)
        return left


class Group(_ExitCodes, click.Group):
    """Commands under one name."""

    command_class = Command
    group_class = type  # groups inside are of this class, too

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # deepspeed's launcher puts this in front unless told not to; processes read LOCAL_RANK
        return super().parse_args(ctx, [word for word in args[:1] if not word.startswith("--local_rank=")] + args[1:])


class Flag(click.Option):
    """The help entry of one option; its value is read by `split`, since click knows neither `--x false` nor `--x 2 4 8`."""

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf
        super().__init__([f"option_{leaf.path.replace('.', '__')}", leaf.flag, *leaf.flags], expose_value=False, help=leaf.help)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        names = ", ".join(sorted([self.leaf.flag, *self.leaf.flags], key=lambda flag: flag.startswith("--")))
        value = f" / --no-{self.leaf.flag[2:]}" if self.leaf.type is bool else f" {metavar(self.leaf.type)}"
        about = "; ".join(part for part in (self.leaf.shown_default, bounds(self.leaf.limits)) if part)
        return names + value, f"{self.leaf.help}  [{about}]" if about else self.leaf.help


def command_group(help: str, **settings: Any) -> Group:
    """A group of commands; call it, or `main(group)`, as the entry point of a package."""
    return Group(help=help, **settings)


def main(cli: click.Command) -> NoReturn:
    """Run a command or group on the arguments of this process and leave with its exit code."""
    cli.main()
    raise AssertionError("a command that runs standalone does not return")


def configured(cls: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one flag per option of `cls`, and --config, --config-file, --set, --json, --quiet and --print-config.

    The function receives the built configuration first, `json` (whether --json was given) if it has a
    parameter of that name, and whatever further click options and arguments it declares. Under --json
    everything that it prints goes to stderr, and the mapping it returns becomes the one object on stdout.

    A class may accept files in other words than its own: `from_file(mapping) -> mapping` gets the content of each.

    A class may read files that its own options name: `further_layers(values) -> list of mappings` gets the values by
    path as they stand, and what it returns comes after the files of --config.

    A class may name flags of a guide that have no option: `words`, a mapping of flag to `lm_core.flags.Word`.

    A flag wins over --set, which wins over a later file, an earlier file, and the default. An option named
    `config` takes --config over; --config-file always reads a file.
    """
    options = list(leaves(cls))
    claimed = {flag for leaf in options for flag in (leaf.flag, *(flag.replace("_", "-") for flag in leaf.flags))}
    if taken := claimed & set(_OWN):
        raise TypeError(f"{cls.__name__}: every command has {', '.join(sorted(taken))} already")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _notice(function.__module__.partition(".")[0])
        wants_json = "json" in inspect.signature(function).parameters

        @functools.wraps(function)
        def run(
            *, lm_files: tuple[str, ...], lm_set: tuple[str, ...], lm_json: bool, lm_quiet: bool, lm_print_config: bool, **others: Any
        ) -> None:
            context = click.get_current_context()
            if _SPLIT not in context.meta:
                raise TypeError(f"{context.command_path}: make it with command_group(...).command(), or with click.command(cls=Command)")
            config = resolve(cls, lm_files, lm_set, context.meta[_SPLIT])
            for notice in context.meta[_SPLIT].notices:
                logger.info(notice)
            if lm_print_config:
                click.echo(json.dumps(to_dict(config)) if lm_json else to_yaml(config), nl=lm_json)
                return
            if wants_json:
                others["json"] = lm_json
            with _quietly() if lm_quiet else contextlib.redirect_stdout(sys.stderr) if lm_json else contextlib.nullcontext():
                try:
                    result = function(config, **others)
                except BrokenPipeError as error:
                    logger.warning("a pipe was closed at its other end: %s", error)  # click leaves without a word
                    raise
            if lm_json and _rank() == 0:
                click.echo(json.dumps(_finite(result or {}), default=str))

        files = [flag for flag in ("-c", "--config", "--config-file") if flag not in claimed]
        shared = [
            click.Option(
                ["lm_files", *files], multiple=True, metavar="FILE", help="YAML or JSON file of options, repeatable; later files win."
            ),
            click.Option(
                ["lm_set", "--set"], multiple=True, metavar="KEY=VALUE", help="One option by its key, repeatable; wins over files."
            ),
            click.Option(["lm_json", "--json"], is_flag=True, help="Print one JSON object on stdout, everything else on stderr."),
            click.Option(["lm_quiet", "--quiet"], is_flag=True, help="Print warnings and errors only, and the object of --json."),
            click.Option(["lm_print_config", "--print-config"], is_flag=True, help="Print the resolved options as YAML and stop."),
        ]
        own = getattr(function, "__click_params__", [])
        # click reverses this list, because decorators are applied from the bottom up
        run.config_class = cls  # type: ignore[attr-defined]  # for lm_core.reference
        run.__click_params__ = [*own, *reversed([*(Flag(leaf) for leaf in options), *shared])]  # type: ignore[attr-defined]
        return run

    return decorate


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No standard output and no notices, while warnings and errors are written as ever."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(before)


def resolve(cls: type, files: tuple[str, ...], settings: tuple[str, ...], flags: Spelled) -> Any:
    """The configuration from files, --set and flags; Mistakes names everything that is wrong in any of them."""
    mistakes, layers = list(flags.mistakes), []
    for path in files:
        try:
            layers.append(cls.from_file(load(path)) if hasattr(cls, "from_file") else load(path))
        except ConfigError as error:
            mistakes.append(str(error))
    given: list[Mapping[str, Any]] = []
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign:
            mistakes.append(f"--set {setting}: has no value; write --set KEY=VALUE")
            continue
        try:
            given.append({key: _structured(find(cls, key), value)})
        except ConfigError as error:
            mistakes.append(str(error))
    given.append({path: _mapping(find(cls, path), value) for path, value in flags.values.items()})
    if len(layers) < len(files):
        # without the file that could not be read, nobody knows what is missing or does not fit together
        raise Mistakes([*mistakes, *wrong_values(cls, *layers, *given)])
    try:
        if hasattr(cls, "further_layers"):
            layers += cls.further_layers(merge(cls, *layers, *given))
        built: Any = build(cls, *layers, given=given)
    except Mistakes as error:
        raise Mistakes([*mistakes, *error.mistakes]) from None
    except ConfigError as error:
        raise Mistakes([*mistakes, str(error)]) from None
    if mistakes:
        raise Mistakes(mistakes)
    return built


def _structured(kind: Any, text: str) -> Any:
    """The value of --set: as a flag reads it, but also a YAML list or mapping where one is meant, and null."""
    if kind is None or (takes_text(kind) and kind is not Any):
        return None if text == "null" and type(None) in typing.get_args(kind) else text
    return parse(f"value: {text}", f"--set {text}")["value"] if text[:1] in ("[", "{") else text


def _mapping(kind: Any, value: Any) -> Any:
    """The value of a flag; a mapping may be written as one YAML mapping instead of KEY=VALUE."""
    one = typing.get_origin(without_none(kind)) is dict and isinstance(value, list) and len(value) == 1
    return _structured(kind, value[0]) if one else value


def _exit_code(run: Callable[[], Any]) -> int:
    """Run a command; print what went wrong on stderr, and say so by the exit code (see lm_core.errors)."""
    _log_to_stderr()
    rank = f"[rank {_rank()}] " if _rank() else ""
    try:
        result = run()
        return result if isinstance(result, int) else 0
    except UserError as error:
        click.echo(f"{rank}error: {error}", err=True)
        return error.code
    except click.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # click takes every EOFError for a closed terminal, also that of a damaged file
            return _bug(abort.__cause__, rank)
        click.echo(f"{rank}interrupted", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return 2
    except Exception as error:
        return _bug(error, rank)


def _bug(error: BaseException, rank: str) -> int:
    traceback.print_exception(error)
    click.echo(f"{rank}This is a bug, not your mistake. Please report it as an issue, with the lines above and the command.", err=True)
    return 1


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what `sys.stderr` is at that moment, so that redirection works."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

    @property
    def stream(self) -> Any:
        return sys.stderr

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.levelno == logging.INFO else super().format(record)


def _log_to_stderr() -> None:
    """Warnings of all ranks, notices of the first."""
    root = logging.getLogger()
    if not any(isinstance(handler, _Stderr) for handler in root.handlers):
        root.addHandler(_Stderr())
    _notice("lm_core")
    _notice("kernels_cuda")


def _notice(package: str) -> None:
    logging.getLogger(package).setLevel(logging.WARNING if _rank() else logging.INFO)


def _rank() -> int:
    """The rank a launcher gave this process; lm_core.dist would load torch."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _finite(value: Any) -> Any:
    """`value` with null for numbers that JSON cannot write."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
