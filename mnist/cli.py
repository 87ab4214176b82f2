"""The command line: argv -> `TrainConfig`.

In: tokens. Out: a checked configuration, or an exit: 0 after `--help`, `--list-recipes`, `--print-config`, and 2 after
a mistake, which rank 0 alone explains. Precedence: recipe < `--config` file < command line. A file is turned into
tokens and parsed by the same rules, because YAML reads 1e-3 as a string and would slip it past the checks.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_type_hints

import tyro
import yaml

from mnist.config import DataConfig, TrainConfig, check_choice, choices_of, sections, to_flat
from mnist.errors import RunError, UserError, print_error
from mnist.recipes import RECIPES
from mnist.system import process

_DESCRIPTION = """Trains an MNIST digit recogniser with Accelerate: on a CPU, a GPU, or many.

  accelerate launch train_ddp.py                                  the default recipe
  accelerate launch train_ddp.py --recipe lenet5 --epochs 3       another recipe, shorter
  torchrun --nproc-per-node 2 train_ddp.py --wandb offline        two processes"""

T = TypeVar("T")
RunOption = Annotated[str | None, tyro.conf.arg(aliases=("--run-dir",))]  # torchrun takes --run for one of its own
_Flag = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True)
class _CommandLine:
    train: TrainConfig = field(default_factory=TrainConfig)
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE.yaml")] = None
    """Read options from a YAML file, as --print-config writes it; the command line overrides it."""
    list_recipes: _Flag = False
    """List the recipes and exit."""
    print_config: _Flag = False
    """Print the resolved configuration as YAML and exit."""


def parse_command_line(argv: Sequence[str] | None = None) -> TrainConfig:
    """Parses `argv` (default: the process's own). Needs neither torch nor anything else that is slow to import.

    Raises:
        SystemExit: 0 when something was asked to be printed, 2 at a mistake.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        typed = _normalise(sys.argv[1:] if argv is None else argv)
        file = _last_value(typed, "--config")
        from_file = _file_tokens(Path(file)) if file is not None else []
        tokens = [*_count_passes(from_file), *_count_passes(typed)]
        _check_choices(tokens)
        _check_recipe(typed, file, from_file)
        default = RECIPES[_last_value(tokens, "--recipe") or "fast"]()
    except UserError as error:
        raise SystemExit(print_error(error)) from None
    with _words_from(is_main):
        parsed = tyro.cli(
            _CommandLine,
            prog="train_ddp.py",
            description=_DESCRIPTION,
            args=tokens,
            default=_CommandLine(default),
            config=(tyro.conf.OmitArgPrefixes,),
            console_outputs=is_main,
        )
    if parsed.list_recipes or parsed.print_config:
        if is_main:
            with _words_from(is_main):
                sys.stdout.write(_recipe_table() if parsed.list_recipes else to_yaml(parsed.train))
        raise SystemExit(0)
    return parsed.train


def parse_options(options: type[T], command: str, description: str) -> T:
    """Parses the process's command line for one of the commands beside training, into its own dataclass.

    Args:
        options: a frozen dataclass; each field is a flag, its docstring the help text.
        command: as in `python -m mnist.<command>`.
        description: what --help says first.

    Raises:
        SystemExit: 0 after --help, 2 at a mistake, which rank 0 alone explains.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, and silently, until `run_command` takes over
    process.tune()
    is_main = os.environ.get("RANK", "0") == "0"
    with _words_from(is_main):
        return tyro.cli(
            options,
            prog=f"python -m mnist.{command}",
            description=description,
            config=(tyro.conf.FlagCreatePairsOff,),
            console_outputs=is_main,
        )


@contextlib.contextmanager
def _words_from(is_main: bool) -> Iterator[None]:
    """Lets rank 0 alone explain mistakes; whoever has read enough of --help may close the pipe (`| head`)."""
    process.fill_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # as standard error does with what its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with contextlib.nullcontext() if is_main else contextlib.redirect_stderr(io.StringIO()):
            yield
        sys.stdout.flush()
    except UserError as error:  # a value out of its range
        raise SystemExit(print_error(error)) from None
    except OSError as error:
        _discard_output()
        is_pipe = isinstance(error, BrokenPipeError)
        raise SystemExit(0 if is_pipe else print_error(RunError(f"standard output: {error.strerror}"))) from None


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(command: Callable[[T], int], options: T) -> NoReturn:
    """Runs a command and exits with its code: a mistake of its user is one line (2), Ctrl-C 130, `| head` no error."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = command(options)
        sys.stdout.flush()
    except (UserError, RunError) as error:
        code = print_error(error)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        _discard_output()
        code = 0
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        _discard_output()  # rich takes a closed pipe for a failure
        code = 0
    except OSError as error:
        code = print_error(RunError(f"{error.filename or 'standard output'}: {error.strerror or error}"))
        _discard_output()
    process.leave(code)


def _flag_types() -> dict[str, Any]:
    """Every flag of `TrainConfig` with its type."""
    types = {"--recipe": str}
    for section in sections().values():
        types |= {"--" + name.replace("_", "-"): hint for name, hint in get_type_hints(section).items()}
    return types


def _normalise(argv: Sequence[str]) -> list[str]:
    """Splits `--flag=value`, hyphenates flags, and takes `--flag=True`, which W&B sweeps write, for `--flag`."""
    types = _flag_types()
    tokens: list[str] = []
    for token in argv:
        flag, equals, value = token.partition("=")
        if not flag.startswith("--"):
            tokens.append(token)
            continue
        flag = flag.replace("_", "-")
        if types.get(flag) is bool and value.lower() in ("true", "false"):
            tokens.append(flag if value.lower() == "true" else "--no-" + flag[2:])
        else:
            tokens += [flag, value] if equals else [flag]
    return tokens


def _count_passes(tokens: list[str]) -> list[str]:
    """Whoever counts epochs means passes over the data set at hand, unless the same place says otherwise."""
    says_otherwise = {"--stretch-epochs", "--no-stretch-epochs"} & set(tokens)
    return [*tokens, "--no-stretch-epochs"] if "--epochs" in tokens and not says_otherwise else tokens


def _last_value(tokens: Sequence[str], flag: str) -> str | None:
    values = [value for name, value in pairwise(tokens) if name == flag]
    return values[-1] if values else None


def _check_choices(tokens: Sequence[str]) -> None:
    """Names the flag, the valid values and the likely meant one, which tyro does for flags but not for values."""
    choices = {flag: choices_of(hint) for flag, hint in _flag_types().items()} | {"--recipe": list(RECIPES)}
    for flag, value in pairwise(tokens):
        valid = choices.get(flag)
        is_none = value == "None" and type(None) in get_args(_flag_types()[flag]) if valid else False
        if valid and not is_none:
            check_choice(flag, value, valid)


def _check_recipe(typed: Sequence[str], file: str | None, from_file: Sequence[str]) -> None:
    """A file of --print-config holds a whole recipe: another one beside it would give the run its name, and no more."""
    wanted, found = _last_value(typed, "--recipe"), _last_value(from_file, "--recipe")
    if wanted and found and wanted != found and "--model" in from_file:
        raise UserError(f"--recipe {wanted}: --config {file} holds all of recipe {found}; leave out one of the two")


def _file_tokens(path: Path) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines like 'lr: 0.001'")
    types = _flag_types()
    tokens: list[str] = []
    for name, value in content.items():
        flag = "--" + str(name).replace("_", "-")
        if flag not in types:
            near = difflib.get_close_matches(str(name), [f[2:].replace("-", "_") for f in types], n=1, cutoff=0.7)
            raise UserError(f"--config {path}: {name}: unknown" + (f"; did you mean {near[0]}?" if near else ""))
        if isinstance(value, bool) and types.get(flag) is bool:
            tokens.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, bool):
            tokens += [flag, "yes" if value else "no"]  # as it was written: YAML takes a bare no for false
        elif isinstance(value, list):
            tokens += [flag, *map(str, value)]
        else:
            tokens += [flag, str(value)]
    return tokens


def to_yaml(config: TrainConfig) -> str:
    """A file for `--config` that reproduces this configuration, on a machine that keeps its data elsewhere, too."""
    flat = to_flat(config)
    if config.data.data_dir == DataConfig().data_dir:
        del flat["data_dir"]
    return yaml.safe_dump(flat, sort_keys=False, allow_unicode=True)


def _recipe_table() -> str:
    lines = []
    for name, recipe in RECIPES.items():
        summary, *details = (line.strip() for line in (recipe.__doc__ or "").strip().splitlines())
        expect = next((line for line in details if line.startswith("Expect:")), "")
        lines += [f"{name:16} {summary}", f"{'':16} {expect}"]
    return "\n".join(lines) + "\n"
