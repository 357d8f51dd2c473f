"""Notes, phrases and drum hits of a SoundFont, rendered by fluidsynth."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SLOT_S = 2.5
HIT_S = 1.5
NOTES, SINGLE_NOTES = 8, 6  # of each preset; the others are phrases
DRUMS = 128  # the bank of drum kits
TICKS = 960  # a second: 480 a quarter note, at 120 a minute
RATE = 32000


class Event(NamedTuple):
    """One MIDI message at a time in seconds."""

    seconds: float
    message: bytes


class Slot(NamedTuple):
    """One sound to cut from a rendering: what it is, when it starts, and its longest duration in seconds."""

    name: str
    start: float
    seconds: float


def presets(font: bytes) -> list[tuple[int, int, str]]:
    """Return (bank, program, name) of each preset of a SoundFont."""
    at = font.rfind(b"phdr")
    size = struct.unpack_from("<I", font, at + 4)[0]
    rows = [struct.unpack_from("<20sHH", font, at + 8 + 38 * row) for row in range(size // 38 - 1)]
    return [(bank, program, name.split(b"\0")[0].decode("latin-1").strip()) for name, program, bank in rows]


def midi_file(events: Sequence[Event]) -> bytes:
    """Return a MIDI file of one track."""
    track, now = b"", 0
    for event in sorted(events):
        tick = round(event.seconds * TICKS)
        delta, now = tick - now, tick
        length = bytes([delta & 127])
        while delta := delta >> 7:
            length = bytes([delta & 127 | 128]) + length
        track += length + event.message
    track += b"\0\xff\x2f\0"
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, 480) + b"MTrk" + struct.pack(">I", len(track)) + track


def preset_events(bank: int, program: int, kind: str) -> tuple[list[Event], list[Slot]]:
    """Choose the sounds of one preset, the same each time.

    Args:
        kind: ``drums`` plays each key, ``notes`` plays single notes and phrases, ``phrases`` no single notes. The bank
            of drum kits is always played key by key.
    """
    drawn = random.Random(f"{bank}-{program}")
    channel = 9 if bank == DRUMS else 0
    setup = [bytes([0xB0 | channel, 120, 0])]
    if bank != DRUMS:
        setup.append(bytes([0xB0, 0, bank & 127]))
    setup.append(bytes([0xC0 | channel, program]))
    events = [Event(0.0, message) for message in setup]
    slots: list[Slot] = []

    def play(key: int, at: float, seconds: float) -> None:
        velocity = drawn.randint(45, 125)
        events.append(Event(at, bytes([0x90 | channel, key, velocity])))
        events.append(Event(at + seconds, bytes([0x80 | channel, key, 0])))

    at = 0.05
    if bank == DRUMS or kind == "drums":
        for key in range(27, 88):
            play(key, at, 0.3)
            slots.append(Slot(f"bank {bank} program {program} key {key}", at, HIT_S))
            at += HIT_S
        return events, slots
    for number in range(NOTES):
        root = drawn.randint(33, 88)
        label = "phrase" if number >= SINGLE_NOTES else "note"
        if label == "phrase":
            when = at
            while when < at + 1.8:
                length = drawn.uniform(0.1, 0.5)
                for _ in range(drawn.choice((1, 1, 2, 3))):
                    play(min(max(root + drawn.randint(-12, 12), 21), 108), when, length)
                when += length
        elif kind == "notes":
            play(root, at, drawn.uniform(0.15, 1.6))
        else:
            continue
        slots.append(Slot(f"bank {bank} program {program} {label} {number}", at, SLOT_S))
        at += SLOT_S + 0.3
    return events, slots


def render(font: Path, midi: bytes, folder: Path, seconds: float) -> npt.NDArray[np.int16]:
    """Return mono samples at ``RATE`` of a MIDI file played by a SoundFont."""
    song, out = folder / "song.mid", folder / "song.raw"
    song.write_bytes(midi)
    options = [
        "-ni",
        "-q",
        "-g",
        "0.5",
        "-r",
        str(RATE),
        "-R",
        "0",
        "-C",
        "0",
        "-O",
        "s16",
        "-T",
        "raw",
        "-F",
        str(out),
    ]
    options += ["-o", "synth.dynamic-sample-loading=1"]  # a large SoundFont is then not read as a whole
    subprocess.run(
        ["fluidsynth", *options, str(font), str(song)],
        check=True,
        timeout=300 + 2 * seconds,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stereo = np.fromfile(out, np.int16)[: 2 * int(seconds * RATE)].reshape(-1, 2).astype(np.int32)
    out.unlink()
    return (stereo.sum(1) // 2).astype(np.int16)
