"""The corpus of the study: near-duplicates, manifest, licences, MIDI."""

from __future__ import annotations

import lzma
import struct
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.quality import corpus, soundfonts
from benchmarks.quality.near_duplicates import SAMPLE_RATE, Floats, near_duplicates, prints


def sound(seed: int, seconds: float = 1.5) -> Floats:
    """Make a few decaying bursts, each with its own partials."""
    rng = np.random.default_rng(seed)
    wav = np.zeros(int(seconds * SAMPLE_RATE))
    for start in np.sort(rng.uniform(0, 0.8 * seconds, 4)):
        at = np.arange(len(wav) - int(start * SAMPLE_RATE)) / SAMPLE_RATE
        decay = np.exp(-at / rng.uniform(0.05, 0.3))
        wav[-len(at) :] += decay * sum(np.sin(2 * np.pi * at * hz) for hz in rng.uniform(150, 6000, 5))
    return np.asarray(wav / np.abs(wav).max(), np.float32)


def altered(wav: Floats, seed: int) -> Floats:
    """Change gain and start, and add noise at -40 dB."""
    rng = np.random.default_rng(seed)
    late = np.concatenate([np.zeros(int(rng.integers(50, 4000)), np.float32), wav])
    return np.asarray(0.3 * (late + 0.01 * rng.standard_normal(len(late))), np.float32)


def test_copies_are_near_duplicates_and_other_sounds_are_not() -> None:
    originals = [prints(sound(seed)) for seed in range(20)]
    copies = [prints(altered(sound(seed), seed)) for seed in range(20)]
    assert near_duplicates(copies, originals) == {number: number for number in range(20)}
    assert near_duplicates(originals) == {}


def test_an_excerpt_repeats_the_longer_sound() -> None:
    long = sound(1, 12.0)
    excerpt = long[4 * SAMPLE_RATE : 9 * SAMPLE_RATE]
    assert near_duplicates([prints(excerpt)], [prints(sound(2)), prints(long)]) == {0: 1}


def test_a_longer_sound_repeats_an_excerpt() -> None:
    long = np.concatenate([sound(1, 6.0), sound(3, 20.0)])
    assert near_duplicates([prints(long)], [prints(sound(2)), prints(sound(1, 6.0))]) == {0: 1}


def test_of_equal_sounds_the_first_stays() -> None:
    a, b = sound(1), sound(2)
    clips = [prints(one) for one in (a, b, altered(a, 3), altered(b, 4), altered(a, 5))]
    assert near_duplicates(clips, block=3) == {2: 0, 3: 1, 4: 0}


def test_silence_repeats_nothing() -> None:
    silence = prints(np.zeros(SAMPLE_RATE, np.float32))
    assert len(silence) == 0
    assert near_duplicates([silence, silence]) == {}


def test_the_manifest_holds_what_was_written() -> None:
    packages = [
        corpus.Package(
            "a", "1:2-3", "ff" * 32, ["GPL-2+", "CC0"], [corpus.Sound("effects/a-00001", "0" * 32, 1.25, "x/y z")]
        ),
        corpus.Package(
            "b", "1", "00" * 32, ["MIT"], [corpus.Sound("notes/b-00007", "1" * 32, 2.0, "f.sf2#bank 0 note 1")]
        ),
    ]
    empty = corpus.Package("c", "1", "00" * 32)
    assert corpus.parse_manifest(corpus.manifest_lines([*packages, empty])) == packages


def test_the_committed_manifest_has_each_name_once_and_no_refused_package() -> None:
    with lzma.open(corpus.MANIFEST, "rt", encoding="utf-8") as file:
        packages = corpus.parse_manifest(file)
    names = [sound.name for package in packages for sound in package.sounds]
    assert len(names) == len(set(names))
    assert sum(sound.seconds for package in packages for sound in package.sounds) > 20 * 3600
    assert {package.name for package in packages} <= set(corpus.listed())
    assert not set(corpus.KEPT_FOR_TESTS) & set(corpus.listed())
    assert all(package.licences and corpus.UNKNOWN not in package.licences for package in packages)


@pytest.mark.parametrize(
    ("path", "kind", "seconds", "expected"),
    [
        ("/usr/share/games/x/music/a.ogg", "game", 3.0, "music"),
        ("/usr/share/games/x/a.ogg", "game", 80.0, "music"),
        ("/usr/share/games/x/voices/a.ogg", "game", 3.0, "speech"),
        ("/usr/share/games/x/sounds/a.ogg", "game", 3.0, "effects"),
        ("/usr/share/x/music/a.ogg", "drums", 3.0, "drums"),
        ("/usr/share/x/samples/drums/a.ogg", "samples", 3.0, "drums"),
        ("/usr/share/x/samples/pads/a.ogg", "samples", 3.0, "notes"),
        ("/usr/share/x/a_desc_ca.ogg", "game", 3.0, "speech"),
    ],
)
def test_kind_of(path: str, kind: str, seconds: float, expected: str) -> None:
    assert corpus.kind_of(path, kind, seconds) == expected


def test_licences_follow_the_last_pattern_that_matches() -> None:
    text = """Format: x

Files: *
Copyright: a
License: GPL-2+

Files: sounds/*.ogg
 music/one.ogg
Copyright: b
License: CC-BY-SA-3.0
 The text.

License: GPL-2+
 Its text."""
    assert corpus.licences(text, ["usr/share/games/x/sounds/a.ogg"]) == ["CC-BY-SA-3.0"]
    assert corpus.licences(text, ["usr/share/x/music/one.ogg", "usr/share/x/music/two.ogg"]) == [
        "CC-BY-SA-3.0",
        "GPL-2+",
    ]
    assert corpus.licences("Permitted under the GPL, some under CC-BY 3.0.", []) == ["CC-BY 3.0", "GPL"]
    text = "See http://creativecommons.org/licenses/by-sa/2.0. Redistribution and use in source and binary forms"
    assert corpus.licences(text, []) == ["BSD", "CC-BY-SA-2.0"]
    assert corpus.licences("Free.", []) == [corpus.UNKNOWN]


def test_groups_of_valid_and_test_splits_are_refused(tmp_path) -> None:
    (tmp_path / "t").mkdir()
    rows = "file_name,label,split,group\na,x,train,kit1\nb,x,valid,kit2\nc,x,test,kit3\n"
    (tmp_path / "t" / "t.csv").write_text(rows)
    always = (*corpus.KEPT_FOR_TESTS, *corpus.OF_TEST_AUTHORS)
    assert corpus.refused_words(tmp_path) == tuple(sorted(("kit2", "kit3", *always)))


def test_files_inside_a_container() -> None:
    wav = b"RIFF" + struct.pack("<I", 6) + b"WAVEab"
    first, last = (b"OggS\0" + bytes([flags]) + bytes(20) + b"\2\3\1abcd" for flags in (2, 4))
    packed = b"head" + wav + b"middle" + first + last + wav + wav + first
    assert list(corpus.embedded(packed)) == [wav, first + last, wav, wav, first]


def test_midi_file_of_one_note() -> None:
    events = [soundfonts.Event(0.5, b"\x80\x3c\x00"), soundfonts.Event(0.0, b"\x90\x3c\x40")]
    track = b"\x00\x90\x3c\x40" + b"\x83\x60\x80\x3c\x00" + b"\x00\xff\x2f\x00"  # 480 ticks are 0x83 0x60
    expected = b"MThd\0\0\0\6\0\0\0\1\1\xe0" + b"MTrk" + struct.pack(">I", len(track)) + track
    assert soundfonts.midi_file(events) == expected


def test_presets_of_a_soundfont() -> None:
    rows = [(b"Piano", 0, 0), (b"Kit", 8, 128), (b"EOP", 0, 0)]
    chunk = b"".join(struct.pack("<20sHH14x", name, program, bank) for name, program, bank in rows)
    assert soundfonts.presets(b"phdr" + struct.pack("<I", len(chunk)) + chunk) == [(0, 0, "Piano"), (128, 8, "Kit")]


def test_sounds_of_a_preset_do_not_overlap() -> None:
    for bank, kind in ((0, "notes"), (0, "phrases"), (0, "drums"), (soundfonts.DRUMS, "notes")):
        _, slots = soundfonts.preset_events(bank, 5, kind)
        assert all(a.start + a.seconds <= b.start + 1e-9 for a, b in pairwise(slots))
        assert soundfonts.preset_events(bank, 5, kind)[1] == slots


def test_trim_cuts_silence_and_drops_clips_without_sound() -> None:
    wav = np.zeros(SAMPLE_RATE, np.float32)
    assert len(corpus.trim(wav)) == 0
    wav[4000:8000] = 0.5
    assert len(corpus.trim(wav)) == 160 + 4000 + 799
