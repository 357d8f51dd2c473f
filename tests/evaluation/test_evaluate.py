"""Linear evaluation: protocols, metrics against hand counts, baselines, and what stops it."""

from __future__ import annotations

import csv
import json
import logging
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.tasks import PITCHES, make_task, write_task, write_tone

from byola_fast import AudioNTT2020, LogMel, cli
from byola_fast.audio.reading import AudioError
from byola_fast.embedding import streaming
from byola_fast.embedding.embedder import Embedder
from byola_fast.embedding.streaming import NOT_FINITE
from byola_fast.evaluation import evaluate as module
from byola_fast.evaluation import report
from byola_fast.evaluation.config import EvalConfig
from byola_fast.evaluation.evaluate import run_eval
from byola_fast.evaluation.probe import Scores, truth_table
from byola_fast.evaluation.report import OLD_COLUMNS, append_result, check_results, draw_confusion
from byola_fast.evaluation.tasks import NAMED, TaskError
from byola_fast.networks.encoder_file import describe_encoder, save_encoder
from byola_fast.spectrograms.log_mel import FRONT_END


@pytest.fixture(scope="module")
def split_task(tmp_path_factory):
    labels = [name for _ in range(10) for name in PITCHES]
    part = lambda n: ("train", "train", "train", "valid", "test")[n // 3 % 5]  # noqa: E731
    return make_task(tmp_path_factory.mktemp("split"), labels, part, "file_name,label,split")


@pytest.fixture(scope="module")
def fold_task(tmp_path_factory):
    labels = [name for _ in range(8) for name in PITCHES]
    part = lambda n: f"speaker{n // 3 % 4}"  # noqa: E731
    return make_task(tmp_path_factory.mktemp("fold"), labels, part, "file_name,label,fold")


@pytest.fixture
def weights(tmp_path):
    path, encoder = tmp_path / "encoder.pth", AudioNTT2020(16, 32)
    save_encoder(path, encoder, config=describe_encoder(encoder, LogMel(n_mels=16)), stats=(-7.1, 4.2))
    return str(path)


@pytest.fixture(autouse=True)
def few_segments(monkeypatch):
    monkeypatch.setattr(module, "STATS_SEGMENTS", 40)


def evaluate(task, tmp_path, **settings):
    return run_eval(EvalConfig(str(task), out=str(tmp_path / "out"), workers=0, **settings))


def lines_of(tmp_path) -> list[dict[str, str]]:
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_split_with_weights(split_task, tmp_path, weights):
    result = evaluate(split_task, tmp_path, weights=weights)
    assert result.score > 0.8
    assert result.by_seed == [result.score]  # nothing is drawn
    sha256 = result.line["weights_sha256"]
    assert result.picture == tmp_path / "out" / f"tones-encoder-{sha256[:8]}-confusion.png"
    assert result.picture.stat().st_size > 5000
    counts, stats = "30 clips, 3 classes; train 18, valid 6, test 6", "of the weights; --stats task takes the task's"
    for words in (counts, stats, "C chosen on valid", "one run", "macro", "clips/s"):
        assert words in result.report
    (line,) = lines_of(tmp_path)
    assert (line["task"], line["metric"], line["encoder"], line["feature_d"]) == (
        "tones",
        "accuracy",
        "AudioNTT2020",
        "32",
    )
    assert (line["train"], line["valid"], line["test"], line["stats_mean"]) == ("18", "6", "6", "-7.1000")
    with open(result.predictions, newline="") as file:
        clips = list(csv.DictReader(file))
    classes = ("high", "low", "mid")
    for clip in clips:
        chances = {name: float(clip[f"p({name})"]) for name in classes}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-5)
        assert clip["predicted"] == max(chances, key=chances.get)
        assert (clip["split"], clip["seed"], clip["label"]) == (
            "test",
            "0",
            list(PITCHES)[int(clip["file_name"][:-4]) % 3],
        )
    assert sum(clip["label"] == clip["predicted"] for clip in clips) / len(clips) == result.score
    assert float(line["score_percent"]) == pytest.approx(100 * result.score, abs=0.05)


@pytest.mark.slow
def test_folds_seeds_and_baselines(fold_task, tmp_path, weights, monkeypatch):
    melstats = evaluate(fold_task, tmp_path, features="melstats", seeds=2)
    assert melstats.score > 0.9
    random = evaluate(fold_task, tmp_path, features="random", seeds=2, weights=weights)
    assert random.line["feature_d"] == 32  # the network of the weights
    again = evaluate(fold_task, tmp_path, features="random", feature_d=16, seeds=1)
    assert (again.line["feature_d"], again.line["folds"], again.line["train"]) == (16, 4, "")
    assert "one fold left out at a time; C chosen on another fold" in melstats.report
    assert "; folds speaker0: 6, speaker1: 6, speaker2: 6, speaker3: 6\n" in random.report
    assert "std over 2 seeds" in random.report
    assert "--stats task" not in random.report
    assert "over 4 folds" in random.report
    assert len(random.by_seed) == 2
    assert [line["features"] for line in lines_of(tmp_path)] == ["melstats", "random", "random"]
    means = {line["stats_mean"] for line in lines_of(tmp_path)}
    assert len(means) == 2  # of 16 and of 64 mels: the statistics are the task's, not the weights'
    assert "-7.1000" not in means

    monkeypatch.setattr(module, "embed_clips", lambda *_args, **_words: pytest.fail("embedded again"))
    kept = evaluate(fold_task, tmp_path, features="random", seeds=2, weights=weights)
    assert kept.by_seed == random.by_seed
    with pytest.raises(pytest.fail.Exception):
        evaluate(fold_task, tmp_path, features="random", seeds=2, weights=weights, pad_sec=2.0)
    for path in (tmp_path / "out" / "embeddings").glob("*.npz"):
        os.truncate(path, 300)
    with pytest.raises(pytest.fail.Exception):  # damaged ones are made anew
        evaluate(fold_task, tmp_path, features="random", seeds=2, weights=weights)


def test_multi_label(tmp_path):
    names = ["low", "mid", "high", "low,mid", "low, high", "mid,high"] * 6
    part = lambda n: ("train", "train", "test")[n // 6 % 3]  # noqa: E731
    task = make_task(tmp_path / "task", names, part, "file_name,label,split")
    result = evaluate(task, tmp_path, features="melstats", seeds=2)
    assert result.score > 0.9
    assert (result.line["metric"], result.picture) == ("mAP", None)
    assert "binary logistic regressions" in result.report
    assert "C chosen on a fifth of train" in result.report
    assert "accuracy" not in result.report
    with open(result.predictions, newline="") as file:
        clips = list(csv.DictReader(file))
    assert [clip["seed"] for clip in clips] == ["0"] * 12 + ["1"] * 12
    assert sum(clip["label"] == clip["predicted"] for clip in clips) > 12
    assert all(("low" in clip["predicted"]) == (float(clip["p(low)"]) >= 0.5) for clip in clips)


def test_the_order_of_lines_moves_no_score(tmp_path):
    """Labels at random, so that every choice of C and every drawn clip shows."""
    labels = random.Random(1).choices(list(PITCHES), k=60)
    task = make_task(tmp_path / "task", labels, lambda n: "train" if n < 40 else "test", "file_name,label,split")
    header, *lines = task.read_text().splitlines()
    found = []
    for shuffle in range(3):
        random.Random(shuffle).shuffle(lines)
        write_task(tmp_path / "task", header, lines)
        result = evaluate(task, tmp_path / str(shuffle), features="melstats", seeds=3)
        found.append((result.by_seed, result.macro, result.line["C"], result.predictions.read_text()))
    assert found[0] == found[1] == found[2]


def test_a_folder_is_no_task(split_task, tmp_path):
    with pytest.raises(TaskError, match=r"got a folder; byola-fast recipes folders .* TASK\.csv makes one"):
        evaluate(split_task.parent, tmp_path)
    with pytest.raises(
        TaskError, match=r"w\.pth: expected a CSV file of a task, got a name of weights; these come befo"
    ):
        evaluate("w.pth", tmp_path)


def test_what_is_left_out(split_task, tmp_path, caplog):
    audio, lines = split_task.parent / "audio", split_task.read_text().splitlines()
    (tmp_path / "audio").mkdir()
    for path in audio.iterdir():
        if path.name not in ("0.wav", "5.wav"):
            (tmp_path / "audio" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "audio" / "7.wav").write_text("no audio")
    (tmp_path / "audio" / "8.wav").write_bytes(b"")
    lines[1 + 10] = "10.wav,,train"
    task = write_task(tmp_path / "csv", lines[0], lines[1:])
    settings = {"features": "melstats", "audio": str(tmp_path / "audio")}
    with pytest.raises(TaskError, match="1 lines without label: 12; --keep_going"):
        evaluate(task, tmp_path, **settings)
    task = write_task(tmp_path / "csv", lines[0], [*lines[1:11], *lines[12:]])
    with pytest.raises(TaskError, match=r"2 of 29 files missing in .*audio, first 0.wav; --keep_going"):
        evaluate(task, tmp_path, **settings)
    for number in (0, 5):
        (tmp_path / "audio" / f"{number}.wav").write_bytes((audio / f"{number}.wav").read_bytes())
    with pytest.raises(TaskError, match=r"2 broken files, 7\.wav: not audio"):
        evaluate(task, tmp_path, **settings)
    assert not (tmp_path / "out" / "results.csv").exists()
    for number in (0, 5):
        (tmp_path / "audio" / f"{number}.wav").unlink()
    task = write_task(tmp_path / "csv", lines[0], lines[1:])
    with caplog.at_level(logging.WARNING, "byola_fast"):
        result = evaluate(task, tmp_path, keep_going=True, **settings)
    assert result.line["left_out"].count(";") == 2
    assert "25 clips" in result.report
    assert {name for name in ("0.wav", "5.wav", "7.wav", "8.wav") if name in caplog.text} == {
        "0.wav",
        "5.wav",
        "7.wav",
        "8.wav",
    }


def test_a_wrong_folder_names_a_few_files(split_task, tmp_path, caplog):
    with pytest.raises(TaskError, match=r"30 of 30 files missing in "):
        evaluate(split_task, tmp_path, features="melstats", audio=str(tmp_path))
    assert [record.getMessage().split()[0] for record in caplog.records] == ["missing:"] * (NAMED + 1)
    assert caplog.records[-1].getMessage() == f"missing: {30 - NAMED} more"


def test_class_that_the_training_part_lacks(split_task, tmp_path):
    lines = [line for line in split_task.read_text().splitlines() if not ('"high"' in line and "train" in line)]
    task = write_task(tmp_path / "csv", lines[0], lines[1:])
    settings = {"features": "melstats", "audio": str(split_task.parent / "audio")}
    with pytest.raises(TaskError, match="1 of 3 classes absent from split train: high; --keep_going counts"):
        evaluate(task, tmp_path, **settings)
    result = evaluate(task, tmp_path, keep_going=True, **settings)
    assert result.score <= 4 / 6 + 1e-9
    assert "high        2       0.0" in result.report


def test_clips_shorter_than_a_frame_and_long_ones(tmp_path):
    generator = torch.Generator().manual_seed(1)
    lines = []
    for number in range(12):
        label = ("low", "high")[number % 2]
        samples = (1, 100, 5000, 40000)[number // 2 % 4]
        write_tone(tmp_path / "task" / "audio" / f"{number}.wav", label, generator, samples)
        lines.append(f"{number}.wav,{label},{number // 4}")
    task = write_task(tmp_path / "task", "file_name,label,fold", lines)
    assert 0 <= evaluate(task, tmp_path, features="random", feature_d=8, seeds=1, pad_sec=0.0).score <= 1


def test_refused_settings(split_task, fold_task, tmp_path):
    for words, settings in {
        "features: expected trained, random or melstats, got 'x'": {"features": "x"},
        "seeds: expected at least 1": {"features": "random", "seeds": 0},
        "feature_d: expected none": {"weights": "w.pth", "feature_d": 8},
        "feature_d: expected at least 1": {"features": "random", "feature_d": 0},
        "pad_sec: expected 0 to 86400 s, got nan": {"features": "random", "pad_sec": float("nan")},
        "stats: expected weights that hold": {"features": "random", "stats": "weights"},
        "no such folder": {"features": "random", "audio": str(tmp_path / "none")},
        "dtype: expected": {"features": "random", "dtype": "int8"},
        "device: expected auto": {"features": "random", "device": "gpu"},
        "device: expected one": {"features": "melstats", "device": "cuda:99"},
    }.items():
        with pytest.raises((ValueError, OSError), match=words):
            evaluate(split_task, tmp_path, **settings)
    with pytest.raises(ValueError, match=r"encoder: torch\.nn:Linear cannot be made"):
        evaluate(split_task, tmp_path / "a", features="random", encoder="torch.nn:Linear")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_text("mine\n1\n")
    with pytest.raises(ValueError, match="has other columns"):
        evaluate(split_task, tmp_path, features="melstats")
    assert (tmp_path / "out" / "results.csv").read_text() == "mine\n1\n"
    with pytest.raises(FileNotFoundError):
        evaluate(tmp_path / "none.csv", tmp_path, features="melstats")


def test_the_table_of_classes_counts_clips_as_the_confusion_matrix(split_task, tmp_path, monkeypatch):
    """One of class "high" in a fold where it is right, many in another where they are wrong."""

    def fit(_features, task, plan):
        truth = truth_table(task)[plan.test]
        scores = np.where(truth, 1.0, 0.0)
        scores[:, 0] -= 2 * (len(plan.test) > 20)  # classes are sorted: "high" is the first
        return Scores(plan.test, truth, scores, 1.0, 1.0)

    monkeypatch.setattr(module, "fit_probe", fit)
    lines = [
        f"{n}.wav,{('low', 'mid', 'high')[n % 3]},{'a' if n == 2 or (n % 3 < 2 and n < 9) else 'b'}" for n in range(30)
    ]
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "tones.csv").write_text("\n".join(["file_name,label,fold", *lines]))
    result = evaluate(
        folder / "tones.csv", tmp_path, features="melstats", seeds=2, audio=str(split_task.parent / "audio")
    )
    assert re.search(r"^high +10 +10\.0$", result.report, re.MULTILINE)


@pytest.mark.slow
def test_each_encoder_has_its_own_picture(split_task, tmp_path):
    pictures = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        encoder = AudioNTT2020(16, 32)
        config = describe_encoder(encoder, LogMel(n_mels=16))
        save_encoder(tmp_path / name / "encoder.pth", encoder, config=config, stats=(-7.1, 4.2))
        for features in ("trained", "random", "melstats"):
            settings = {"weights": str(tmp_path / name / "encoder.pth"), "features": features, "seeds": 1}
            pictures.add(evaluate(split_task, tmp_path, **settings).picture.name)
    pictures.add(evaluate(split_task, tmp_path, features="random", feature_d=24, seeds=1).picture.name)
    assert len(pictures) == 5  # two encoders, two widths of random weights, and no network


@pytest.mark.slow
def test_from_the_command_line(split_task, tmp_path, weights, capsys):
    out = str(tmp_path / "eval")
    assert cli.main(["eval", str(weights), str(split_task), "--out", out]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert cli.main(["eval", "--encoder", "melstats", str(split_task), "--keep-going", "--out", out]) == 0
    assert len((tmp_path / "eval" / "results.csv").read_text().splitlines()) == 3
    assert cli.main(["eval", str(tmp_path / "none.pth"), str(split_task), "--out", out]) == cli.USAGE_ERROR
    assert "none.pth" in capsys.readouterr().err

    clips = str(split_task.parent / "audio")
    assert cli.main(["embed", str(weights), clips, "--frames", "--out", str(tmp_path / "frames.npz")]) == 0
    assert "0 broken" in capsys.readouterr().out
    with np.load(tmp_path / "frames.npz") as written:
        assert len(written["timestamps_ms"]) == len(written["embeddings"]) > 30


def test_a_results_file_of_version_0_1_is_appended_to(split_task, tmp_path):
    path = tmp_path / "out" / "results.csv"
    path.parent.mkdir()
    path.write_text(",".join(OLD_COLUMNS) + "\n")
    evaluate(split_task, tmp_path, features="melstats", audio=str(split_task.parent / "audio"))
    (line,) = lines_of(tmp_path)
    assert (line["encoder"], line["network"]) == ("melstats", "MelStats")
    assert "features" not in line


def copy_of(audio, folder, order):
    """The clips of a folder under each other's names, of equal sizes and times."""
    folder.mkdir(parents=True)
    for name, source in zip(sorted(path.name for path in audio.iterdir()), order, strict=True):
        (folder / name).write_bytes((audio / source).read_bytes())
        os.utime(folder / name, ns=(0, 0))
    return folder


def test_cached_embeddings_belong_to_their_folder(split_task, tmp_path):
    """Equal names, sizes and times do not make equal files, in another folder or at another time."""
    names = sorted(path.name for path in (split_task.parent / "audio").iterdir())
    right = copy_of(split_task.parent / "audio", tmp_path / "right", names)
    mixed = copy_of(split_task.parent / "audio", tmp_path / "mixed", random.Random(0).sample(names, len(names)))
    settings = {"features": "melstats", "stats": str(tmp_path / "stats.json")}
    (tmp_path / "stats.json").write_text(STATS)
    assert evaluate(split_task, tmp_path, audio=str(right), **settings).score == 1
    wanted = evaluate(split_task, tmp_path / "alone", audio=str(mixed), **settings)
    assert wanted.score < 1
    assert evaluate(split_task, tmp_path, audio=str(mixed), **settings).report.count(f"{100 * wanted.score:.1f} %")
    right.rename(tmp_path / "old")
    mixed.rename(right)
    assert evaluate(split_task, tmp_path, audio=str(right), **settings).by_seed == wanted.by_seed


STATS = json.dumps(
    {"mean": -7.0, "std": 4.0, "segments": 10, "front_end": {n: getattr(LogMel(), n) for n in FRONT_END}}
)


class Scaled(torch.nn.Module):
    feature_d = 4

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(self, x):
        return self.scale * self.table * x.mean((1, 2, 3))[:, None]


class Other(Scaled):
    pass


def test_cached_embeddings_belong_to_their_encoder(tmp_path, monkeypatch):
    """A state dict is not all of an encoder."""
    (tmp_path / "a.wav").write_bytes(b"x")

    def key(encoder, **settings):
        config = EvalConfig("t.csv", **settings)
        return module._key(Embedder(encoder.eval(), stats=(0.0, 1.0)), config, [tmp_path / "a.wav"])

    table = Scaled()
    table.table[2] = 3.0
    found = [key(Scaled()), key(Scaled(2.0)), key(Other()), key(table), key(Scaled(), dtype="bfloat16")]
    found.append(key(Scaled(), pad_sec=2.0))
    assert key(Scaled()) == found[0]
    monkeypatch.setattr(module, "_versions", lambda: ["other"])
    found.append(key(Scaled()))
    code = tmp_path / "code.py"
    for text in ("1", "2"):  # seen by clips of 10 s alone, say
        code.write_text(text)
        monkeypatch.setattr(module.inspect, "getfile", lambda _kind: str(code))
        found.append(key(Scaled()))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("keep_going", [False, True])
def test_broken_clips_are_tried_again(split_task, tmp_path, monkeypatch, keep_going):
    """A disk that fails for a moment; the other clips are not embedded twice."""
    read, broken, seen = streaming.read_audio, {"3.wav", "7.wav"}, []

    def failing(path, *arguments, **words):
        seen.append(path.name)
        if path.name in broken:
            raise AudioError(path, "Input/output error")
        return read(path, *arguments, **words)

    monkeypatch.setattr(streaming, "read_audio", failing)
    settings = {"features": "melstats", "stats": str(tmp_path / "stats.json"), "keep_going": keep_going}
    (tmp_path / "stats.json").write_text(STATS)
    if keep_going:
        assert evaluate(split_task, tmp_path, **settings).line["left_out"] == "2 broken files"
    else:
        with pytest.raises(TaskError, match=r"2 broken files, 3\.wav: Input/output error; --keep_going"):
            evaluate(split_task, tmp_path, **settings)
    assert len(seen) == 30
    broken.remove("7.wav")
    seen.clear()
    with pytest.raises(TaskError, match=r"1 broken files, 3\.wav"):
        evaluate(split_task, tmp_path, **settings | {"keep_going": False})
    assert sorted(seen) == ["3.wav", "7.wav"]
    broken.clear()
    seen.clear()
    again = evaluate(split_task, tmp_path, **settings)
    assert (seen, again.line["left_out"]) == (["3.wav"], "")
    assert again.line["clips_per_sec"] == lines_of(tmp_path)[0]["clips_per_sec"]
    assert again.by_seed == evaluate(split_task, tmp_path / "fresh", **settings).by_seed


def test_embeddings_that_are_not_finite_are_broken(split_task, tmp_path, monkeypatch):
    embed = module.embed_clips

    def some_nan(embedder, files, **words):
        for piece in embed(embedder, files, **words):
            path = files[piece.number]
            error = AudioError(path.name, NOT_FINITE)
            yield piece._replace(rows=piece.rows[:0], error=error) if int(path.stem) in bad else piece

    monkeypatch.setattr(module, "embed_clips", some_nan)
    bad = {4}
    with pytest.raises(TaskError, match=r"1 broken files, 4\.wav: the embedding is not finite"):
        evaluate(split_task, tmp_path, features="melstats")
    bad = {n for n in range(30) if n // 3 % 5 == 4}  # all of test
    with pytest.raises(TaskError, match="no clip left of split test"):
        evaluate(split_task, tmp_path / "b", features="melstats", keep_going=True)
    assert not (tmp_path / "out" / "results.csv").exists()


AWKWARD = ["$x_{$", "$a$ and $b", "two\\$", "a\tb", "\udcff", "\u97f3\u697d", "long " * 60, "{x} %s \\frac"]


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_any_label_is_drawn_as_it_is(split_task, tmp_path, caplog):
    generator = torch.Generator().manual_seed(5)
    lines = []
    for number in range(4 * len(AWKWARD)):
        write_tone(tmp_path / "$t" / "audio" / f"{number}.wav", ("low", "high")[number % 2], generator)
        lines.append(f'{number}.wav,"{AWKWARD[number // 4]}",{("train", "train", "train", "test")[number % 4]}\n')
    text = "file_name,label,split\n" + "".join(lines)
    task = tmp_path / "$t" / "$t\udcff$.csv"
    task.write_bytes(text.encode("utf-8", "surrogateescape"))
    result = evaluate(task, tmp_path, features="melstats", seeds=1)
    assert result.picture.stat().st_size > 5000
    assert len(lines_of(tmp_path)) == 1
    assert "\n$a$ and $b " in result.report
    assert "\na\\tb " in result.report
    assert "\n\\udcff " in result.report
    assert max(map(len, result.report.splitlines()[-15:])) < 250
    assert sum("drawn as boxes" in record.getMessage() for record in caplog.records) == 1
    draw_confusion(tmp_path / "a.svg", np.eye(len(AWKWARD)), AWKWARD, "$5 and $6")
    drawn = (tmp_path / "a.svg").read_text()
    assert all(words in drawn for words in ("$x_{$", "$a$ and $b", "two\\$", "a\\tb", "\\udcff", "$5 and $6"))


def test_a_picture_that_fails_loses_no_results(split_task, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(report, "draw_confusion", lambda *_: 1 / 0)
    result = evaluate(split_task, tmp_path, features="melstats")
    assert (result.picture, len(lines_of(tmp_path))) == (None, 1)
    assert "tones-melstats-confusion.png: cannot be drawn: division by zero" in caplog.text
    assert "confusion matrix" not in result.report


def test_a_clip_under_two_names(split_task, tmp_path, caplog):
    audio = tmp_path / "audio"
    copy_of(split_task.parent / "audio", audio, sorted(path.name for path in (split_task.parent / "audio").iterdir()))
    (audio / "linked.wav").symlink_to(audio / "0.wav")
    lines = [*split_task.read_text().splitlines(), "linked.wav,low,test"]
    task = write_task(tmp_path / "csv", lines[0], lines[1:])
    with pytest.raises(TaskError, match=r"0\.wav and linked\.wav are one file, .*/audio/0\.wav"):
        evaluate(task, tmp_path, features="melstats", audio=str(audio))
    assert "same bytes" not in caplog.text
    (audio / "linked.wav").unlink()
    (audio / "linked.wav").write_bytes((audio / "0.wav").read_bytes())
    evaluate(task, tmp_path, features="melstats", audio=str(audio))
    message = "1 clips occur in several splits or folds, with the same bytes: 0.wav (train) and linked.wav (test)"
    assert message in caplog.text


def test_results_are_appended_whole(tmp_path, monkeypatch):
    path = tmp_path / "out" / "results.csv"
    path.parent.mkdir()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: append_result(path, {"task": f"{n}\udcff"}), range(40)))
    assert sorted(line["task"] for line in lines_of(tmp_path)) == sorted(f"{n}\\udcff" for n in range(40))
    check_results(path)
    path.write_text(path.read_text().removesuffix("\n"))
    append_result(path, {"task": "after a line without an end"})
    assert len(lines_of(tmp_path)) == 41
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        append_result(path, {"task": "lost"})
    assert path.read_bytes() == before


def test_statistics_of_another_front_end_are_refused(split_task, tmp_path, weights):
    (tmp_path / "stats.json").write_text(STATS)
    with pytest.raises(ValueError, match=r"stats\.json: computed with n_mels 64, expected 16"):
        evaluate(split_task, tmp_path, weights=weights, stats=str(tmp_path / "stats.json"))
