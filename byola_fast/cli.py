"""The command line: one dataclass for each command, and one line for each error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import byola_fast
from byola_fast.ops import BackendError
from byola_fast.pretrain import DEMO, PretrainConfig, pretrain

PROG = "byola-fast"
USAGE_ERROR, INTERRUPTED = 2, 130  # exit codes


@dataclass
class ShowConfig:
    """Settings of a picture of views.

    Attributes:
        out: picture to write; its suffix is the format (png, pdf, svg).
        samples: segments to draw; by default 1 of a file and 3 of a folder.
        preset: "byola-v1" (mixup up to 0.4) or "byola-v2" (mixup up to 0.2, and a random linear fader).
        interpolation: of the resized crops: "bilinear" or "bicubic".
        unit_sec: length of a segment, in seconds.
        sample_rate: rate that audio is resampled to, in Hz.
        seed: picks files, segments and parameters; the same seed draws the same picture.
    """

    out: str = "views.png"
    samples: int | None = None
    preset: str = "byola-v1"
    interpolation: str = "bilinear"
    unit_sec: float = 0.95
    sample_rate: int = 16000
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 after an error of use or data, 130 after an interrupt."""
    from jsonargparse import ArgumentError

    argv = [_with_underscores(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    _log_to_stderr()
    try:
        settings = _make_parser(demo="--demo" in argv).parse_args(argv)
        return _run(settings.command, settings[settings.command])
    except (ArgumentError, BackendError, ImportError, OSError, ValueError) as error:
        print(f"{PROG}: error: {' '.join(_message(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _with_underscores(argument: str) -> str:
    """Let ``--batch-size`` stand for ``--batch_size``, as the setting is called in files and in Python."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _make_parser(demo: bool) -> Any:
    from jsonargparse import ArgumentParser

    options: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
    parser = ArgumentParser(prog=PROG, description="Fast BYOL-A.", version=byola_fast.__version__, **options)
    commands = parser.add_subcommands(dest="command", required=True)

    train = ArgumentParser(description="Pre-train an encoder on a folder of audio.", **options)
    train.add_argument("AUDIO_DIR", nargs="?", help="folder of audio files, or one file")
    train.add_argument(
        "--demo", action="store_true", help="train for about a minute on a corpus made in OUT/demo_audio"
    )
    train.add_argument("--config", action="config", help="YAML file of settings, named as the flags are")
    train.add_class_arguments(PretrainConfig, skip={"demo"}, as_group=False)
    if demo:
        train.set_defaults(**DEMO)
    commands.add_subcommand("pretrain", train, help="pre-train an encoder on a folder of audio")

    picture = ArgumentParser(description="Draw the original, partner, mix and both views of some segments.", **options)
    picture.add_argument("PATH", help="audio file, or a folder of them")
    picture.add_class_arguments(ShowConfig, as_group=False)
    commands.add_subcommand("show", picture, help="draw what the augmentation does to a recording")

    report = ArgumentParser(description="Report which backend runs each op here, and why.", **options)
    commands.add_subcommand("doctor", report, help="report which backend runs each op here, and why")
    return parser


def _run(command: str, settings: Any) -> int:
    values = dict(settings.as_dict())
    if command == "pretrain":
        values["audio_dir"] = values.pop("AUDIO_DIR") or values["audio_dir"]
        values.pop("config")
        result = pretrain(PretrainConfig(**values))
        told = f"loss {result.loss:.3f}, spread {result.collapse:.2f} (1 is healthy, 0 collapsed)"
        print(f"{result.steps} steps: {told}; results in {result.out}")
        return INTERRUPTED if result.interrupted else 0
    if command == "show":
        from byola_fast.show import show

        print(show(values.pop("PATH"), **values))
        return 0
    print(byola_fast.doctor())
    return 0


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


class _Stderr(logging.Handler):
    """Write to whatever stderr is at the moment, so that lines do not tear a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().removeprefix("byola_fast: ")
        print(f"{PROG}: {message}", file=sys.stderr, flush=True)


def _log_to_stderr() -> None:
    logger = logging.getLogger("byola_fast")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
    logger.setLevel(logging.INFO)
    logger.propagate = False
