"""The command line: one dataclass per command, one line per error."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import byola_fast
from byola_fast.audio.pack import PackConfig, run_pack
from byola_fast.embedding.embed_files import EmbedConfig, run_embed
from byola_fast.embedding.export import ExportConfig, run_export
from byola_fast.embedding.whiten import WhitenConfig, run_whiten
from byola_fast.evaluation.config import EvalConfig
from byola_fast.evaluation.evaluate import run_eval
from byola_fast.evaluation.recipes import RECIPES, write_task
from byola_fast.networks.encoder_file import names_weights
from byola_fast.ops import BackendError
from byola_fast.runtime.console import reader_may_leave, say
from byola_fast.runtime.device import keep_freed_memory
from byola_fast.runtime.distributed import RankError
from byola_fast.runtime.interrupts import INTERRUPTED, interruptible
from byola_fast.spectrograms.corpus_statistics import StatsConfig, run_stats
from byola_fast.training.config import DEMO, PretrainConfig
from byola_fast.training.pretrain import pretrain
from byola_fast.training.published import from_published
from byola_fast.training.run_folder import CONFIG
from byola_fast.views.show import ShowConfig, show

PROG = "byola-fast"
ABOUT = "BYOL-A: pre-train an audio encoder on unlabelled sound, embed, evaluate. First: byola-fast pretrain --demo"
RANK_LOST, USAGE_ERROR, SIGNALLED = 1, 2, 128  # exit codes; a signal's number is added to 128
OLD_FLAGS = {"--precision": ("pretrain",), "--network": ("eval",), "--encoder": ("eval",)}  # of version 0.1

WORDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "text",
    "tuple": "two numbers, as 0.6,1.5",
    "NoneType": "null",
}


CONFIGS = {
    "pretrain": PretrainConfig,
    "pack": PackConfig,
    "stats": StatsConfig,
    "embed": EmbedConfig,
    "whiten": WhitenConfig,
    "export": ExportConfig,
    "eval": EvalConfig,
    "show": ShowConfig,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success. 1: another process died. 2: wrong use or data. 130: interrupted. 143: SIGTERM, with everything saved.
    """
    from jsonargparse import ArgumentError

    argv = list(sys.argv[1:] if argv is None else argv)
    _log_to_stderr()
    try:
        options, others = _split(argv)
        if argv[:1] == ["pretrain"]:
            if others and any(option.startswith("--audio_dir=") for option in options):
                raise ValueError(
                    f"audio_dir: expected the argument or the option, got both: {others[0]} is the argument"
                )
            options = [*_own_config(options, others), *options]
            options = [_published(option) for option in options]
        parser = _make_parser(demo="--demo" in options)
        if not argv:
            parser.print_help(sys.stderr)
            return USAGE_ERROR
        with reader_may_leave(sys.stdout) if sys.stdout else nullcontext():  # --help prints
            settings = parser.parse_args([*argv[:1], *options, *(["--", *others] if others else [])])
        keep_freed_memory()  # a process of our own; a library may not
        with interruptible():
            return _run(settings.command, settings[settings.command])
    except ArgumentError as error:
        flags = [setting.name for setting in fields(CONFIGS[argv[0]])] if argv[0] in CONFIGS else []
        say(f"{PROG}: {_rank()}error: {explain(str(error), flags)}", sys.stderr)
        return USAGE_ERROR
    except (BackendError, ImportError, OSError, RankError, ValueError) as error:
        say(f"{PROG}: {_rank()}error: {' '.join(_message(error).split())}", sys.stderr)
        return RANK_LOST if isinstance(error, RankError) else USAGE_ERROR
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):  # torch has no class for it on a CPU
            raise
        say(
            f"{PROG}: {_rank()}error: out of memory: {(str(error).strip() or 'no reason given').splitlines()[0]}",
            sys.stderr,
        )
        return USAGE_ERROR
    except KeyboardInterrupt:
        say(f"{PROG}: interrupted", sys.stderr)
        return INTERRUPTED


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split what follows the command into options, as ``--name=value``, and the rest.

    argparse accepts no option between arguments that are none.
    """
    command, words = next(iter(argv), ""), deque(argv[1:])
    types = get_type_hints(CONFIGS[command]) if command in CONFIGS else {}
    valued = {f"--{name}" for name in types if types[name] is not bool} | {"--config", *OLD_FLAGS}
    paired = {f"--{name}" for name in types if "tuple" in str(types[name])}
    options: list[str] = []
    others: list[str] = []
    while words:
        word = words.popleft()
        if word == "--":
            return options, [*others, *words]
        if not word.startswith("-") or word == "-":
            others.append(word)
            continue
        option = _with_underscores(word)
        if option in valued and words and not words[0].startswith("--"):
            option += "=" + words.popleft()
        if option.partition("=")[0] in paired:
            option = re.sub(r"=([^[(,]+,[^,]+)$", r"=[\1]", option)  # 0.6,1.5 for [0.6,1.5]
        options.append(_renamed(command, _named_like_nothing(option)))
    return options, others


def _named_like_nothing(option: str) -> str:
    """Keep the name of a file that YAML takes for a comment or for null."""
    flag, equals, value = option.partition("=")
    return f"{flag}=./{value}" if equals and (value.startswith("#") or value == "~") else option


def _with_underscores(argument: str) -> str:
    """Turn ``--batch-size`` into ``--batch_size``, the setting's name in files and in Python."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _renamed(command: str, option: str) -> str:
    """Replace a flag of version 0.1 by its new name and warn; to be removed in version 0.3."""
    flag, equals, value = option.partition("=")
    if not equals or command not in OLD_FLAGS.get(flag, ()):
        return option
    new_flag, new_value = _new_flag(flag, value)
    if new_flag != flag:
        message = "%s %s is now called %s %s; the old name goes in version 0.3"
        logging.getLogger("byola_fast").warning(message, flag, value, new_flag, new_value)
    return f"{new_flag}={new_value}"


def _new_flag(flag: str, value: str) -> tuple[str, str]:
    if flag == "--precision":
        return "--dtype", {"bf16": "bfloat16"}.get(value, value)
    if flag == "--network":
        return "--encoder", value
    return ("--features" if value in ("trained", "random", "melstats") else flag), value


def _own_config(options: list[str], others: list[str]) -> list[str]:
    """Return the run's own settings, for ``pretrain --out RUN --resume`` without a folder."""
    given = dict(option.partition("=")[::2] for option in options)
    own = Path(given.get("--out", PretrainConfig.out)) / CONFIG
    asked = "--resume" in given and not others and not {"--config", "--audio_dir", "--demo"} & given.keys()
    return [f"--config={own}"] if asked and own.is_file() else []


def _published(option: str) -> str:
    """Replace the file of ``--config`` by its content under our names."""
    import yaml

    path = option.removeprefix("--config=")
    if path == option or not Path(path).is_file():
        return option
    return "--config=" + yaml.safe_dump(from_published(read_yaml(path)))


def _make_parser(demo: bool) -> Any:
    from jsonargparse import ArgumentParser

    options: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
    parser = ArgumentParser(prog=PROG, description=ABOUT, version=byola_fast.__version__, **options)
    commands = parser.add_subcommands(dest="command", required=True)

    train = ArgumentParser(description="Pre-train an encoder on a folder of audio.", **options)
    train.add_argument("AUDIO_DIR", nargs="*", help="folders of audio files, files, manifests, or a packed store")
    message = "YAML file of settings under the flags' names or those of published config.yaml files"
    train.add_argument("--config", action="config", help=message)
    _add_settings(train, PretrainConfig)
    if demo:
        train.set_defaults(**DEMO)
    commands.add_subcommand("pretrain", train, help="pre-train an encoder on a folder of audio")

    store = ArgumentParser(description="Decode a folder of audio once, into a store that is read fast.", **options)
    store.add_argument("AUDIO_DIR", nargs="+", help="folders of audio files, files, or manifests")
    store.add_argument("OUT", help="folder of the store; what was packed there before stays until the new one is whole")
    _add_settings(store, PackConfig, skip={"audio_dir", "out"})
    commands.add_subcommand("pack", store, help="decode a folder of audio once, into a store that is read fast")

    mean_std = ArgumentParser(description="Compute mean and std of the log-mels of random segments.", **options)
    mean_std.add_argument("AUDIO_DIR", nargs="+", help="folders of audio files, files, manifests, or a packed store")
    _add_settings(mean_std, StatsConfig, skip={"audio_dir"})
    commands.add_subcommand("stats", mean_std, help="compute mean and std of a corpus, for pretrain --stats")

    embed = ArgumentParser(description="Write embeddings of audio files of any length.", **options)
    message = "audio files, or folders of them; before them perhaps weights, as --weights takes them"
    embed.add_argument("PATHS", nargs="+", help=message)
    _add_settings(embed, EmbedConfig, skip={"paths"})
    commands.add_subcommand("embed", embed, help="write embeddings of audio files")

    whitening = ArgumentParser(description="Give the directions of an embedding more equal strength.", **options)
    whitening.add_argument("WEIGHTS", help="file of an encoder: encoder.pth, encoder.safetensors, published")
    whitening.add_argument("AUDIO_DIR", help="folder of audio files, one file, a manifest, or a packed store")
    _add_settings(whitening, WhitenConfig, skip={"weights", "audio_dir"})
    commands.add_subcommand("whiten", whitening, help="whiten the embeddings of an encoder, for linear probes")

    export = ArgumentParser(description="Write a network from waveform to embedding for other runtimes.", **options)
    export.add_argument("WEIGHTS", nargs="?", help="the same as --weights")
    _add_settings(export, ExportConfig)
    commands.add_subcommand("export", export, help="write a network from waveform to embedding as ONNX or torch.export")

    evaluation = ArgumentParser(description="Evaluate an encoder, or a baseline, with a linear probe.", **options)
    evaluation.add_argument("WEIGHTS", nargs="?", help="the same as --weights")
    evaluation.add_argument("TASK", help="CSV file: file_name, label, and split or fold")
    _add_settings(evaluation, EvalConfig, skip={"task"})
    commands.add_subcommand("eval", evaluation, help="evaluate an encoder on a labelled task")

    recipes = ArgumentParser(description="Write the task file of a folder of classes or a public data set.", **options)
    recipes.add_argument("DATASET", help=f"one of {', '.join(RECIPES)}; folders: a folder for each class")
    recipes.add_argument("FOLDER", help="the data set, unpacked as its authors laid it out")
    recipes.add_argument("TASK", help="CSV file to write, for eval TASK --audio FOLDER")
    commands.add_subcommand("recipes", recipes, help="write the task file of a folder of classes or a public data set")

    picture = ArgumentParser(description="Draw the original, partner, mix and both views of some segments.", **options)
    picture.add_argument("PATH", help="audio file, or a folder of them")
    _add_settings(picture, ShowConfig)
    commands.add_subcommand("show", picture, help="draw what the augmentation does to a recording")

    report = ArgumentParser(description="Report which backend runs each op here, and why.", **options)
    commands.add_subcommand("doctor", report, help="report which backend runs each op here, and why")
    return parser


def _add_settings(parser: Any, config: type, skip: Collection[str] = ()) -> None:
    """Add a flag for each setting, inherited ones last, with the help of the dataclass's docstring."""
    from docstring_parser import parse
    from jsonargparse import ActionYesNo

    types = get_type_hints(config)
    explained: dict[str, str | None] = {}
    for base in reversed(config.__mro__):
        explained |= {param.arg_name: param.description for param in parse(base.__doc__ or "").params}
    inherited = {field.name for base in config.__mro__[1:] if is_dataclass(base) for field in fields(base)}
    for field in sorted(fields(config), key=lambda field: field.name in inherited):
        if field.name not in skip:
            kind: Any = {"action": ActionYesNo} if types[field.name] is bool else {"type": types[field.name]}
            parser.add_argument(f"--{field.name}", default=field.default, help=explained[field.name], **kind)


def _run(command: str, settings: Any) -> int:
    values = dict(settings.as_dict())
    if len(values.get("AUDIO_DIR") or ()) == 1:
        (values["AUDIO_DIR"],) = values["AUDIO_DIR"]
    if command == "pretrain":
        values["audio_dir"] = values.pop("AUDIO_DIR") or values["audio_dir"]
        values.pop("config")
        result = pretrain(PretrainConfig(**values))
        if not _rank():
            message = f"loss {result.loss:.3f}, spread {result.spread:.2f} (1 is healthy, 0 collapsed)"
            say(f"{result.steps} steps: {message}; results in {result.out}", sys.stdout)
        if result.stopped_by:
            message = "stopped by a signal after step %d; everything is saved, and the same command resumes there"
            logging.getLogger("byola_fast").warning(message, result.steps)
        return SIGNALLED + result.stopped_by if result.stopped_by else 0
    if command == "pack":
        packed = run_pack(PackConfig(values.pop("AUDIO_DIR"), values.pop("OUT"), **values))
        message = "unchanged since it was packed" if packed.unchanged else f"{len(packed.broken)} of them without audio"
        say(f"{packed.out}: {packed.files} files, {packed.seconds / 3600:.2f} h ({message})", sys.stdout)
        return 0
    if command == "stats":
        stats = run_stats(StatsConfig(audio_dir=values.pop("AUDIO_DIR"), **values))
        say(f"mean {stats.mean:.4f}, std {stats.std:.4f} (of {stats.segments} segments)", sys.stdout)
        return 0
    if command == "embed":
        paths = values.pop("PATHS")
        if names_weights(paths[0], folders=len(paths) > 1 and values["weights"] is None):
            values = _with_weights(values | {"WEIGHTS": paths.pop(0)})
        written = run_embed(EmbedConfig(paths=paths, **values))
        if written is not None:
            message = f"{written.rows} x {written.feature_d} of {written.files} files, {len(written.broken)} broken"
            say(f"{written.out}: {message}; {written.speed:.0f} x real time", sys.stdout)
        return 0
    if command == "whiten":
        given = {"weights": values.pop("WEIGHTS"), "audio_dir": values.pop("AUDIO_DIR")}
        say(run_whiten(WhitenConfig(**given, **values)), sys.stdout)
        return 0
    if command == "export":
        say(run_export(ExportConfig(**_with_weights(values))), sys.stdout)
        return 0
    if command == "eval":
        say(run_eval(EvalConfig(task=values.pop("TASK"), **_with_weights(values))).report, sys.stdout)
        return 0
    if command == "recipes":
        say(f"{values['TASK']}: {write_task(values['DATASET'], values['FOLDER'], values['TASK'])} clips", sys.stdout)
        return 0
    if command == "show":
        say(show(values.pop("PATH"), **values), sys.stdout)
        return 0
    say(byola_fast.doctor(), sys.stdout)
    return 0


def _with_weights(values: dict[str, Any]) -> dict[str, Any]:
    """Put weights that are given as an argument in their setting."""
    given = values.pop("WEIGHTS")
    if given is not None and values["weights"] is not None:
        raise ValueError(f"weights: expected one file of them, got {given} and {values['weights']}")
    return values | {"weights": given or values["weights"]}


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


class _Stderr(logging.Handler):
    """Write to the current ``sys.stderr``, which a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().removeprefix("byola_fast: ")
        say(f"{PROG}: {_rank()}{message}", sys.stderr)


def _rank() -> str:
    """Return a prefix for messages of ranks above 0."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[rank {rank}] "


def _log_to_stderr() -> None:
    logger = logging.getLogger("byola_fast")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
    logger.setLevel(logging.INFO)
    logger.propagate = False


def explain(message: str, flags: Collection[str] = ()) -> str:
    """Put a message of the parser into plain words, and suggest the flag that was probably meant.

    Args:
        message: of the parser.
        flags: flags of the command, without dashes.

    >>> explain('Parser key "lr": Expected a <class \\'float\\'>. Got value: fast')
    'lr: expected a number, got fast'
    >>> explain("unrecognized arguments: --batch_sz 32", ["batch_size", "lr"])
    'unrecognized arguments: --batch_sz 32; did you mean --batch-size?'
    >>> explain("the following arguments are required: pack.AUDIO_DIR, pack.OUT")
    'the following arguments are required: AUDIO_DIR, OUT'
    """
    message = " ".join(message.split()).replace("arguments: -- ", "arguments: ")
    message = re.sub(r"(required: |, )\w+\.(?=[A-Z_]+\b)", r"\1", message)
    if found := re.match(r'Parser key "([^"]+)": ', message):
        message = f"{found[1]}: {message[found.end() :]}"
        types = dict.fromkeys(re.findall(r"Expected a <class '(\w+)'>", message))
        value = re.search(r"(?:Got|Given) value: (.*?)(?: - Expected a <.*)?$", message)
        if types and value:
            return f"{found[1]}: expected {' or '.join(WORDS.get(name, name) for name in types)}, got {value[1]}"
    if message.startswith("unrecognized arguments: "):
        given = [word.split("=")[0][2:] for word in message.split() if word.startswith("--")]
        meant = [match for name in given for match in get_close_matches(name, list(flags), n=1)]
        if meant:
            message += f"; did you mean {', '.join('--' + name.replace('_', '-') for name in meant)}?"
    return message


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        ValueError: not YAML, not a mapping, or a name that is there twice.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        content, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error
    names = [name.value for name, _value in tree.value] if isinstance(tree, yaml.MappingNode) else []
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: expected each name once, got {', '.join(twice)} more than once")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected lines of 'name: value', got {type(content).__name__}")
    return content
