"""The settings of a linear evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EvalConfig:
    """Settings of a linear evaluation.

    Attributes:
        task: CSV file: file_name, label, and split (train, valid, test) or fold; labels with commas are several.
        weights: file of an encoder, or a run's folder; by default the weights that come with the package. With features
            "random" it gives the network and the front end alone.
        audio: folder of the files; by default the folder "audio" beside the CSV file, or the CSV file's own folder.
        out: folder for results.csv (one line is appended), the confusion matrix and cached embeddings.
        features: "trained", or a baseline: "random" (the network before training, a new one for each seed) or
            "melstats" (mean, standard deviation and maximum over time of the log-mels).
        encoder: network of random features without weights: "AudioNTT2020" (default), "AudioNTT2022", or your own, as
            package.module:Class. With weights: the class of the network, if it is your own.
        feature_d: width of random features without weights; by default the encoder's own.
        stats: statistics that normalise the log-mels: "weights" (those of the weights), "task" (those of the task's
            training clips, or of all clips if it has folds), or a JSON file from "byola-fast stats". By default
            "weights" for trained features, "task" for baselines.
        seeds: number of seeds for mean and spread; they draw random encoders and, if the task has no valid split, the
            clips that choose the probe.
        pad_sec: pad shorter clips with zeros at both ends to this length, in seconds: half of the zeros at each.
        keep_going: leave out clips that are missing, broken or unlabelled, and continue if train lacks a class (its
            clips then count as errors), instead of stopping.
        dtype: of the encoder: "float32" or "bfloat16".
        device: "cpu", "cuda", "cuda:1" and so on, "mps"; "auto" takes a GPU if there is one.
        workers: processes that decode audio; by default one fewer than CPU cores, at most 8.
    """

    task: str
    weights: str | None = None
    audio: str | None = None
    out: str = "eval"
    features: str = "trained"
    encoder: str | None = None
    feature_d: int | None = None
    stats: str | None = None
    seeds: int = 3
    pad_sec: float = 0.95
    keep_going: bool = False
    dtype: str = "float32"
    device: str = "auto"
    workers: int | None = None
