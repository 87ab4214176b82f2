"""The command line: argv -> `TrainConfig`.

In: tokens. Out: a checked configuration, or an exit: 0 after `--help`, `--list-recipes`, `--print-config`, and 2 after
a mistake, which rank 0 explains in one line. Precedence: recipe < `--config` file < command line. Both are read as text
and converted by the types of `TrainConfig`, so that a value means the same in both, and never becomes a flag.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from mnist.config import DataConfig, TrainConfig, check_choice, evolve, sections, to_flat, user_path
from mnist.errors import MachineError, RunError, UserError, is_first_rank, print_error
from mnist.recipes import RECIPES, list_recipes
from mnist.runs.resumed_config import resumed_config
from mnist.system import launcher, process

_DESCRIPTION = """Trains an MNIST digit recogniser with Accelerate: on a CPU, a GPU, or many.

  accelerate launch train_ddp.py                                  the default recipe
  accelerate launch train_ddp.py --recipe lenet5 --epochs 3       another recipe, shorter
  torchrun --local-addr localhost --nproc-per-node 2 train_ddp.py two processes"""

# Flags of other training scripts -> what they are called here.
_PROCESSES = "accelerate launch --num_processes, or torchrun --nproc-per-node"
_FOREIGN = {
    **dict.fromkeys(("batch_size", "train_batch_size", "per_device_train_batch_size"), "--global-batch-size"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "max_epochs"), "--epochs"),
    **dict.fromkeys(("output_dir", "project_dir", "logging_dir", "save_dir"), "--run-dir"),
    **dict.fromkeys(("checkpointing_steps", "save_steps"), "--checkpoint-every"),
    **dict.fromkeys(("logging_steps", "log_interval"), "--log-every"),
    **dict.fromkeys(("no_cuda", "no_accel", "device"), "--cpu (without it, a GPU is used where there is one)"),
    **dict.fromkeys(("amp", "precision"), "--mixed-precision"),
    **dict.fromkeys(("with_tracking", "report_to"), "--wandb"),
    **dict.fromkeys(("world_size", "gpus", "num_processes"), _PROCESSES),
    **dict.fromkeys(("num_workers", "workers"), "not needed: all images are held in memory"),
    **{name: f"--mixed-precision {name}" for name in ("bf16", "fp16")},
    "learning_rate": "--lr",
    "max_train_steps": "--max-steps",
    "resume_from_checkpoint": "--resume",
    "max_grad_norm": "--grad-clip",
}
MAX_YAML_BYTES = 1_000_000  # of a --config file
_SWITCHES = ("help", "list_recipes", "print_config")

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
    with _errors_in_one_line():
        process.check_surroundings()
        launcher.check_variables()
        typed = _read_tokens(sys.argv[1:] if argv is None else argv)
        file = typed.pop("config", None)
        asked = {name for name in _SWITCHES if typed.pop(name, False)}
        from_file = _read_file(Path(file)) if file is not None else {}
        recipe = typed.get("recipe", from_file.get("recipe", "fast"))
        check_choice("--recipe", recipe, list(RECIPES))
        if recipe != from_file.get("recipe", recipe) and "model" in from_file:
            raise UserError(f"--recipe {recipe}: --config {file} holds all of recipe {from_file['recipe']}; omit one")
        changes = {**from_file, **typed}
        config = evolve(_continued(changes) or RECIPES[recipe](), **changes)
        if not asked:
            return config
        if is_first_rank():
            _print(asked, config)
    raise SystemExit(0)


def _continued(changes: dict[str, Any]) -> TrainConfig | None:
    """The configuration of the run that --resume names, or None; removes what it decides from `changes`."""
    resume = changes.get("resume", "auto")
    if resume in ("auto", "never"):
        return None
    config = resumed_config(resume, changes.pop("run_dir", None))
    del changes["resume"]
    if "recipe" in changes and evolve(config, recipe=changes["recipe"]) != config:
        raise UserError(f"--recipe {changes['recipe']}: --resume {resume} is of recipe {config.recipe}; omit --recipe")
    return config


def _print(asked: set[str], config: TrainConfig) -> None:
    if "help" in asked:
        with contextlib.suppress(SystemExit):
            tyro.cli(
                _CommandLine,
                prog="train_ddp.py",
                description=_DESCRIPTION,
                args=["--help"],
                default=_CommandLine(config),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    else:
        sys.stdout.write(list_recipes() if "list_recipes" in asked else to_yaml(config))


def parse_options(options: type[T], command: str, description: str | None, *, has_ranks: bool = False) -> T:
    """Parses the process's command line for one of the commands beside training, into its own dataclass.

    Args:
        options: a frozen dataclass; each field is a flag, its docstring the help text.
        command: as in `python -m mnist.<command>`.
        description: what --help says first.
        has_ranks: the command may run as several ranks. Other commands ignore the variables of launchers.

    Raises:
        SystemExit: 0 after --help, 2 at a mistake, which rank 0 alone explains.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, and silently, until `run_command` takes over
    process.tune()
    if not has_ranks:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    with _errors_in_one_line():
        process.check_surroundings()
        launcher.check_variables()
        with contextlib.nullcontext() if is_first_rank() else contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(
                options,
                prog=f"python -m mnist.{command}",
                description=description,
                args=[_expand_home(token) for token in sys.argv[1:]],
                config=(tyro.conf.FlagCreatePairsOff,),
                console_outputs=is_first_rank(),
            )


def _expand_home(token: str) -> str:
    flag, equals, value = token.partition("=")
    return f"{flag}={user_path(value)}" if equals and flag.startswith("--") else user_path(token)


class _Output(io.TextIOWrapper):
    """Standard output that names itself in its errors: Python names only files that it cannot open."""

    def write(self, text: str) -> int:
        with self._named_errors():
            return super().write(text)

    def flush(self) -> None:
        with self._named_errors():
            super().flush()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = "standard output"
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered must not fail again at exit
            raise


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Turns errors that need no traceback into one line and an exit code; `| head` is not an error."""
    process.fill_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        is_terminal = sys.stdout.isatty()  # what an encoding lacks is escaped, as on standard error
        sys.stdout = _Output(sys.stdout.buffer, sys.stdout.encoding, "backslashreplace", line_buffering=is_terminal)
    try:
        yield
        sys.stdout.flush()
    except (UserError, RunError) as error:
        raise SystemExit(print_error(error)) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError) and error.filename:
            raise SystemExit(0) from None
        hint = " (a shorter TMPDIR helps)" if "AF_UNIX path too long" in str(error) else ""
        place = f"{error.filename}: " if error.filename else ""
        raise SystemExit(print_error(RunError(f"{place}{error.strerror or error}{hint}"))) from None
    except SystemExit as error:  # rich takes a closed pipe for a failure
        raise (SystemExit(0) if isinstance(error.__context__, BrokenPipeError) else error) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def run_command(command: Callable[[T], int], options: T) -> NoReturn:
    """Runs a command and exits with its code: a mistake of its user is one line (2), Ctrl-C 130, `| head` no error."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _errors_in_one_line():
            code = command(options)
    except SystemExit as error:
        if not isinstance(error.code, int):
            raise
        code = error.code
    process.leave(code)


def _fields() -> dict[str, tuple[Any, bool]]:
    """Every field that the command line may set: its type, and whether it is a path."""
    found: dict[str, tuple[Any, bool]] = {"recipe": (str, False), "config": (str, True)}
    found |= dict.fromkeys(_SWITCHES, (bool, False))
    for section in sections().values():
        hints = get_type_hints(section)
        found |= {f.name: (hints[f.name], f.metadata["is_path"]) for f in fields(section)}
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_tokens(tokens: Sequence[str]) -> dict[str, Any]:
    """The fields that `tokens` set: `--flag value`, `--flag=value`, `--flag`, `--no-flag`; hyphens or underscores."""
    known, found = _fields(), dict[str, Any]()
    groups: list[tuple[str, list[str]]] = []
    for token in tokens:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            groups.append((flag[2:].replace("-", "_"), [value] if equals else []))
        elif token in ("-h",):
            groups.append(("help", []))
        elif groups:
            groups[-1][1].append(token)
        else:
            raise UserError(f"{token}: unknown; flags begin with --")
    for name, values in groups:
        if name == "local_rank":  # python -m torch.distributed.launch adds it; LOCAL_RANK tells the same
            continue
        positive = name.removeprefix("no_")
        if name not in known and known.get(positive, (None, False))[0] is bool and not values:
            name, values = positive, ["false"]  # noqa: PLW2901
        if name not in known:
            raise UserError(f"{_flag(name)}: unknown{_suggest(name, known, _flag)}")
        found[name] = _convert(_flag(name), values, *known[name])
    return found


def _suggest(name: str, known: Iterable[str], spell: Callable[[str], str]) -> str:
    if name in _FOREIGN:
        return f"; here it is {_FOREIGN[name]}"
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {spell(near[0])}?" if near else "; --help lists all flags"


def _convert(flag: str, values: Sequence[str], hint: Any, is_path: bool) -> Any:
    """Text -> a value of the field's type; whether it is valid, the configuration itself checks."""
    if hint == tuple[str, ...]:
        return tuple(values)
    if hint == tuple[float, ...]:
        return tuple(_convert(flag, [value], float, False) for value in values)
    if hint is bool:
        word = values[0].lower() if len(values) == 1 else "true" if not values else ""
        if word not in ("true", "false"):
            raise UserError(f"{flag} {' '.join(values)}: must be true or false")
        return word == "true"
    if len(values) != 1:
        raise UserError(f"{flag}: needs one value, not {len(values)}")
    text, kinds = values[0], (hint, *get_args(hint))
    if type(None) in kinds and text == "None":
        return None
    try:
        return int(text) if int in kinds else float(text) if float in kinds else user_path(text) if is_path else text
    except ValueError:
        raise UserError(f"{flag} {text}: must be a {'whole ' if int in kinds else ''}number") from None


def _read_at_most(path: Path, max_bytes: int) -> bytes:
    """The content of a file, pipe or device."""
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(f"--config {path}: larger than {max_bytes:,} bytes")
    return content


def _read_file(path: Path) -> dict[str, Any]:
    """The fields that a YAML file sets, as their text was written: YAML 1.1 would read 010 as 8 and 1:30 as 90."""
    known, place, found = _fields(), f"--config {path}", dict[str, Any]()
    try:
        root = yaml.compose(_read_at_most(path, MAX_YAML_BYTES), Loader=yaml.SafeLoader)
    except OSError as error:
        raise MachineError(f"{place}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise UserError(f"{place}: cannot be read as YAML (nested too deeply)") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{place}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{place}: expected lines like 'lr: 0.001'")
    for key_node, node in root.value:
        key = str(key_node.value)
        name = key.replace("-", "_")
        if name not in known or name in ("config", *_SWITCHES):
            raise UserError(f"{place}: {key}: unknown{_suggest(name, known, str)}")
        if name in found:
            raise UserError(f"{place}: {key}: given twice")
        is_list = isinstance(node, yaml.SequenceNode) and get_origin(known[name][0]) is tuple
        nodes = node.value if is_list else [node]
        if not all(isinstance(item, yaml.ScalarNode) for item in nodes):
            raise UserError(f"{place}: {key}: must be one value, or a list of values where several are possible")
        words = ["None"] if node.tag == "tag:yaml.org,2002:null" else [item.value for item in nodes]
        try:
            found[name] = _convert(_flag(name), words, *known[name])
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    return found


def to_yaml(config: TrainConfig) -> str:
    """A file for `--config` that reproduces this configuration, on a machine that keeps its data elsewhere, too."""
    flat = to_flat(config)
    if config.data.data_dir == DataConfig().data_dir:
        del flat["data_dir"]
    return yaml.safe_dump(flat, sort_keys=False, allow_unicode=True)
