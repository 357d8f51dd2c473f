"""The settings of a linear evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EvalConfig:
    """Settings of a linear evaluation.

    Attributes:
        task: CSV file: file_name, label, and split (train, valid, test) or fold; labels with commas are several.
        weights: file of an encoder; with features "random" it gives the network and the front end alone.
        audio: folder that file names are relative to; by default the folder audio beside the CSV file, or its own.
        out: folder for results.csv (one line is appended), the confusion matrix, and embeddings to be used again.
        features: "trained", or a baseline: "random" (the network before training, a new one for each seed) or
            "melstats" (mean, standard deviation and maximum over time of the log-mels).
        encoder: network of random features without weights: "AudioNTT2020" (default), "AudioNTT2022", or your own, as
            package.module:Class. With weights: the class of the network, if it is your own.
        feature_d: width of random features without weights; by default the encoder's own.
        stats: mean and standard deviation that log-mels are normalised with: "weights" (those that the weights hold),
            "task" (of the task's training part; of all clips where it has folds), or a JSON file of "byola-fast stats".
            By default "weights" for trained features, "task" for baselines.
        seeds: how many to take mean and spread over; they draw random encoders and, where the task has no valid part,
            what the probe is chosen on.
        pad_sec: shorter clips get zeros at their end, up to this length in seconds.
        keep_going: leave out clips that are missing or broken or have no label, and go on where the training part lacks
            a class (its clips then count as errors), in place of stopping.
        dtype: that the encoder computes in: "float32" or "bfloat16".
        device: "cpu", "cuda", "cuda:1" and so on; "auto" takes a GPU if there is one.
        workers: processes that decode audio; by default one fewer than there are CPU cores, at most 8.
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
