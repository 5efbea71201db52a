"""``--config=FILE:VARIANT --config.a.b=v`` and the other flags of a command."""

import contextlib
import functools
import importlib.resources
import io
import pathlib
import re
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from dsad.core import distributed
from dsad.core.config import Refused, listed, suggestion
from dsad.core.errors import ConfigError, DsadError
from dsad.terminal import console, keys

_KEY = "--config."


def config_directory() -> pathlib.Path:
    """Where the shipped configs lie: inside an installed package, beside it in a checkout."""
    package = pathlib.Path(str(importlib.resources.files("dsad")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> tuple[str, ...]:
    """Names of the configs that come with dsad."""
    names = (p.stem for p in config_directory().glob("*.py") if not p.stem.startswith("_"))
    return tuple(sorted(names))


def locate(spec: str) -> str:
    """``configs/ds2.py:mtd`` or ``ds2:mtd`` with the path of an existing file."""
    path, colon, variant = spec.partition(":")
    shipped = config_directory() / f"{pathlib.Path(path).stem}.py"
    if not pathlib.Path(path).is_file():
        own = path in (shipped.stem, f"configs/{shipped.name}")
        if not own or not shipped.is_file():
            known = shipped_configs()
            raise ConfigError(
                f"--config: no file {path!r}.{suggestion(pathlib.Path(path).stem, known)} "
                f"Shipped with dsad: {listed(known)}; or give the path of your own file."
            )
        path = str(shipped)
    return f"{path}{colon}{variant}"


def start_distributed(values: flags.FlagValues) -> None:
    """Join the other processes as the flags of ``Command.distributed`` say; first of all work."""
    distributed.start(
        coordinator=values.coordinator, num_processes=values.num_processes,
        process_id=values.process_id, auto=values.distributed,
    )  # fmt: skip


def share(name: str, text: str, noun: str) -> float:
    """The value of a flag that is a share, above 0 and at most 1; raises Refused."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value <= 1:
        raise Refused(f"--{name}", f"a {noun} in (0, 1]", text)
    return value


def update(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    """Set keys by dotted names; raises ConfigError for one that does not exist or a wrong type."""
    for key, value in values.items():
        if text := keys.fault(config, key):
            raise ConfigError(text)
        *groups, name = key.split(".")
        holder: Any = config
        for group in groups:
            holder = holder[group]
        try:
            holder[name] = value
        except (TypeError, ValueError) as error:
            kind = type(holder[name]).__name__
            raise ConfigError(f"config.{key}: expected {kind}, found {value!r}.") from error


class Command:
    """Flags of one command. ``parse`` returns (config, flag values, positional arguments).

    Only with ``positional`` may there be any of the last.
    """

    def __init__(self, name: str, usage: str, *, config: str = "", positional: bool = False):
        self.name, self.usage, self.config, self.positional = name, usage, config, positional
        self.values = flags.FlagValues()
        self._least: dict[str, int] = {}
        self._own: list[str] = []
        flags.DEFINE_boolean("help", False, "Show this text.", flag_values=self.values)

    def string(self, name: str, default: str, text: str) -> None:
        """A flag with a string value."""
        self._own.append(name)
        flags.DEFINE_string(name, default, text, flag_values=self.values)

    def integer(self, name: str, default: int, text: str, *, at_least: int = 0) -> None:
        """A flag with an integer value, not below ``at_least``."""
        self._least[name] = at_least
        self._own.append(name)
        flags.DEFINE_integer(name, default, text, flag_values=self.values)

    def switch(self, name: str, text: str) -> None:
        """A flag that is off unless given."""
        self._own.append(name)
        flags.DEFINE_boolean(name, False, text, flag_values=self.values)

    def distributed(self) -> None:
        """The flags that make the command one of several processes."""
        self.switch("distributed", "One process of a cluster that JAX knows: TPU pod, SLURM, ...")
        self.string("coordinator", "", "HOST:PORT on which process 0 listens, without a cluster.")
        self.integer("num_processes", 0, "With --coordinator: how many processes there are.")
        self.integer("process_id", -1, "With --coordinator: which one, from 0.", at_least=-1)

    def early(self, argv: Sequence[str]) -> flags.FlagValues:
        """The flags without the config, which may depend on them; raises ConfigError."""
        argv = [f"dsad {self.name}", *_spelled(argv)]
        with self._readable(argv):
            self.values(argv, known_only=True)
        return self.values

    def chooses_config(self, argv: Sequence[str]) -> bool:
        """Whether a --config is given."""
        return any(re.match("--?config(=|$)", argument) for argument in argv)

    def parse(self, argv: Sequence[str]) -> tuple[Any, flags.FlagValues, list[str]]:
        """Raises ConfigError for what does not exist, has the wrong type or is too small."""
        argv = [f"dsad {self.name}", *_spelled(argv)]
        if "--help" in argv or "-h" in argv or "--helpfull" in argv:
            print(self.help())
            raise SystemExit(0)
        if self.config:
            chosen = [a[9:] for a in argv if a.startswith("--config=")] or [self.config]
            rest = [a for a in argv[1:] if not a.startswith("--config=")]
            # absl wants overrides after the file they override, wherever it was written.
            argv = [argv[0], *(f"--config={locate(spec)}" for spec in chosen), *rest]
            config_flags.DEFINE_config_file(
                "config", None, "Config file.", flag_values=self.values, sys_argv=argv
            )
        with self._readable(argv):
            rest = self.values(argv)[1:]
        for name, least in self._least.items():
            if (value := getattr(self.values, name)) < least:
                raise Refused(f"--{name}", f"an integer >= {least}", value)
        if rest and not self.positional:
            raise ConfigError(f"dsad {self.name}: unexpected argument {rest[0]!r}.")
        config = self.values["config"].value if self.config else None
        if self.config:
            _check_config(config)
            _split(config, argv)
        return config, self.values, rest

    def help(self) -> str:
        """Usage, the command's flags, and how to see and set config keys."""
        lines = [f"dsad {self.name}: {self.usage}", ""]
        about = {}
        for name in self._own:
            default, text = self.values[name].default, str(self.values[name].help)
            given = name.replace("_", "-") + ("" if default is False else "=VALUE")
            about[f"--{given}"] = text if default in (False, "") else f"{text} Default {default}."
        if self.config:
            about |= {
                "--config=FILE[:VARIANT]": f"Config, default {self.config}; shipped with dsad are "
                f"{', '.join(shipped_configs())}.",
                "--config.KEY=VALUE": "Sets a key, such as --config.data.name=mvtec; dsad config "
                "FILE lists them.",
            }
        for flag, text in about.items():
            lines += [f"  {flag}", textwrap.indent(console.wrapped(text, 74), " " * 6)]
        return console.wrapped("\n".join(lines), 80)

    @contextlib.contextmanager
    def _readable(self, argv: Sequence[str]) -> Any:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        except flags.UnrecognizedFlagError as error:
            name = error.flagname
            known = [f"--{n}" for n in self.values]
            hint = suggestion(f"--{name}", known)
            if self.config and not hint:
                hint = keys.question(name, self._loaded(argv), _KEY)
            raise ConfigError(
                f"dsad {self.name}: unknown flag --{name}.{hint} Flags: {listed(known)}."
            ) from error
        except DsadError:
            raise
        except Exception as error:
            self._check_file(argv)
            if isinstance(error, AttributeError | KeyError):
                raise ConfigError(self._unknown_key(argv, error)) from error
            message = re.sub(r"\s+", " ", str(error))
            message = re.sub(r"\('(.*)', .*\)$", r"\1", message)  # of booleans a tuple is told
            raise ConfigError(
                f"dsad {self.name}: {message}{self._expected(argv, error)}"
            ) from error

    def _check_file(self, argv: Sequence[str]) -> None:
        """Refuse a config file that fails by itself, whatever it raises, or gives no config."""
        spec = next((a[9:] for a in argv if a.startswith("--config=")), "")
        if not spec:
            return
        spec = locate(spec)
        try:
            config = self._loaded(argv)
        except DsadError:
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f" in line {f.lineno}" for f in frames if f.filename == spec.partition(":")[0]]
            raise ConfigError(
                f"--config={spec}: the file fails{lines[-1] if lines else ''}: "
                f"{type(error).__name__}: {error}."
            ) from error
        _check_config(config)

    def _loaded(self, argv: Sequence[str]) -> Any:
        """The config without overrides, to say what exists."""
        file = next(a for a in argv if a.startswith("--config="))
        file = f"--config={locate(file[9:])}"
        fresh = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, flag_values=fresh, sys_argv=[argv[0], file])
        fresh([argv[0], file])
        return fresh["config"].value

    def _unknown_key(self, argv: Sequence[str], error: Exception) -> str:
        config = self._loaded(argv)
        given = (a.partition("=")[0].removeprefix(_KEY) for a in argv if a.startswith(_KEY))
        return next(filter(None, (keys.fault(config, key, _KEY) for key in given)), f"{error}")

    def _expected(self, argv: Sequence[str], error: Exception) -> str:
        named = re.search(r"config\.([\w.]+)", str(error))
        if not named or not self.config:
            return ""
        node = self._loaded(argv)
        for part in named[1].rstrip(".").split("."):
            if part not in node:
                return ""
            node = node[part]
        if isinstance(node, ml_collections.ConfigDict):
            return f" (config.{named[1]} is a group; set its keys: {listed(node.keys())})"
        return f" (config.{named[1]}: expected {type(node).__name__}, for example {node!r})"


def _check_config(config: Any) -> None:
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"--config: expected a file whose get_config() returns a ConfigDict, found {config!r}."
        )


def _split(config: Any, argv: Sequence[str]) -> None:
    """Names of a tuple that were given as ``a,b``, apart; absl takes them for one.

    One name with a comma in it is written in quotes of its own, as "'a,b'".
    """
    for argument in argv:
        path, _, text = argument.removeprefix(_KEY).partition("=")
        if not argument.startswith(_KEY) or "," not in text:
            continue
        *groups, name = path.split(".")
        holder = functools.reduce(lambda node, group: node[group], groups, config)
        if isinstance(value := holder[name], tuple) and text in value:
            at = value.index(text)
            names = tuple(filter(None, map(str.strip, text.split(","))))
            holder[name] = (*value[:at], *names, *value[at + 1 :])


def _spelled(argv: Sequence[str]) -> list[str]:
    """Spellings that absl does not read: ``--config.a 1``, and dashes inside flag names."""
    out: list[str] = []
    for argument in argv:
        if out and re.fullmatch(r"--config(\.[\w.]+)?", out[-1]) and not argument.startswith("--"):
            out[-1] = f"{out[-1]}={argument}"
        elif argument.startswith("--") and not argument.startswith("--config"):
            name, equals, value = argument.partition("=")
            out.append(f"--{name[2:].replace('-', '_')}{equals}{value}")
        else:
            out.append(argument)
    return out
