"""Build the corpus of the study from freely licensed Debian packages.

    python -m benchmarks.quality.corpus FOLDER [--jobs 2] [--only NAME ...]
    python -m benchmarks.quality.corpus FOLDER --renew TASKS

The first form downloads the packages of the manifest, checks their files against its checksums, and writes
``FOLDER/audio/KIND/PACKAGE-NUMBER.opus``, mono at 16 kHz. The second form chooses anew, in a folder of its own: it
takes all sound of the packages in ``corpus_packages.txt``, drops duplicates and near-duplicates, of clips of TASKS too,
and writes a new manifest, ``FOLDER/corpus.tsv.xz``. Both resume after a stop. They need Debian's ``apt-get``,
``dpkg-deb``, ``fluidsynth`` and ``ffmpeg``, and ``av`` from PyPI.

The manifest has a line for each package (version, SHA-256, licences as its copyright file names them) and one for each
file: its name here, 128 bits of its source's SHA-256, its seconds, and its path in the package. A sound that is
rendered has the checksum of its SoundFont.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import hashlib
import io
import json
import logging
import lzma
import os
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from benchmarks.quality import soundfonts
from benchmarks.quality.near_duplicates import MATCH, MATCH_HITS, MATCH_TASK, SIZE, Floats, near_duplicates, prints
from byola_fast.runtime.files import as_text, write_whole

PACKAGES = Path(__file__).with_name("corpus_packages.txt")
MANIFEST = Path(__file__).with_name("corpus.tsv.xz")
MIDI_FONTS = ("fluid-soundfont-gm", "csound-soundfont")
KEPT_FOR_TESTS = ("flight-of-the-amazon-queen", "festvox-ru", "gcin-voice")
OF_TEST_AUTHORS = ("ElectricEmpire", "HardElectro")  # drum kits by an author of a valid or test split
SAMPLE_RATE = 16000
BIT_RATE = 32000
MIN_S, MAX_S = 0.06, 90.0  # of a file; longer ones are cut
MAX_PACKAGE_S = 3600.0  # of one kind in one package
LONG_S = 40.0  # a game's file of this duration is music
AUDIO = ("ogg", "oga", "opus", "wav", "flac", "mp3", "aif", "aiff", "au", "g722", "gsm", "alaw")
MODULES = ("mod", "xm", "s3m", "it")
MIDI = ("mid", "midi")
FONTS = ("sf2", "sf3")
CONTAINERS = ("cat", "rcc")  # of OpenTTD and Qt
ARCHIVES = ("zip", "orgue", "pk3", "wz", "jar", "love")
SPEECH = re.compile(
    r"voice|speech|spoken|dialog|narrat|/talk|/words?/|alphabet|taunt|radio|briefing|/say|/lang|/[a-z]{2}/|_desc", re.I
)
DRUMS = re.compile(r"/drums|/latin/|/beats/|drumkits/(?!.*guitar)", re.I)
MUSIC = re.compile(r"music|bgm|song|soundtrack|theme|tune|/tracks?/|/mus/|jingle", re.I)

UNKNOWN = "see its copyright file"

logger = logging.getLogger("benchmarks")


@dataclass
class Sound:
    """One file of the corpus and where it comes from."""

    name: str  # KIND/PACKAGE-NUMBER
    sha256: str
    seconds: float
    path: str


@dataclass
class Package:
    """A package: what identifies it, its licences, its sounds."""

    name: str
    version: str
    sha256: str
    licences: list[str] = field(default_factory=list)
    sounds: list[Sound] = field(default_factory=list)


def kind_of(path: str, package_kind: str, seconds: float) -> str:
    """Return the folder of a sound by its package's kind, its path and duration."""
    if package_kind == "samples":
        return "drums" if DRUMS.search(path) else "notes"
    if package_kind != "game":
        return package_kind
    if MUSIC.search(path) or seconds >= LONG_S:
        return "music"
    return "speech" if SPEECH.search(path) else "effects"


def _named(licence: str) -> str:
    """Return the name of a licence that a text quotes or links to."""
    licence = re.sub(r"CREATIVECOMMONS\.ORG/LICENSES/([A-Z-]+)/", r"CC-\1-", licence)
    return "BSD" if licence == "REDISTRIBUTION AND USE IN SOURCE" else licence


def licences(copyright_text: str, paths: Iterable[str]) -> list[str]:
    """Return the licences that a copyright file names for paths of the package; else those it mentions.

    Its patterns name paths of the source, so the end of a path may match. The last match holds; without one, any may.
    """
    stanzas = []
    for stanza in re.split(r"\n\s*\n", copyright_text):
        files = re.search(r"^Files:((?:.*\n?)(?:[ \t].*\n?)*)", stanza, re.M)
        licence = re.search(r"^Licen[sc]e:[ \t]*(\S.*)", stanza, re.M)
        if files and licence:
            stanzas.append((files.group(1).split(), licence.group(1).strip()))
    if not stanzas:
        known = (
            r"CC[- ]BY(?:[- ]SA)?[- ][1-4]\.[05]|creativecommons\.org/licenses/[a-z-]+/[1-4]\.[05]|CC0|Public Domain"
            r"|L?GPL|Artistic|MIT License|BSD|Redistribution and use in source|OFL|Apache|zlib|EFF Open Audio License"
        )
        found = {one.upper() for one in re.findall(rf"\b(?:{known})\b", copyright_text, re.I)}
        return sorted({_named(one) for one in found}) or [UNKNOWN]
    patterns = [(re.compile(fnmatch.translate(one)), licence) for globs, licence in stanzas for one in globs]
    found = set()
    for path in paths:
        parts = path.split("/")
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        named = [licence for pattern, licence in patterns if any(pattern.match(end) for end in ends)]
        found |= {named[-1]} if named else {licence for _, licence in stanzas}
    return sorted(found)


def versions_and_sizes(packages: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Return version and size of the package that apt would download, for each known one."""
    command = ["apt-cache", "show", "--no-all-versions", *packages]
    stanzas = subprocess.run(command, capture_output=True, text=True).stdout.split("\n\n")
    fields = [dict(re.findall(r"^(Package|Version|Size): (.*)$", stanza, re.M)) for stanza in stanzas if stanza.strip()]
    return {one["Package"]: (one["Version"], int(one["Size"])) for one in fields}


def download(package: str, folder: Path) -> Path:
    """Download a package; apt checks it against Debian's signed index."""
    subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, capture_output=True)
    return next(folder.glob(f"{package}_*.deb"))


def members(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of a package's files that may hold sound, and its copyright file."""
    extensions = AUDIO + MODULES + MIDI + FONTS + ARCHIVES + CONTAINERS
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            path = member.name.removeprefix("./")
            extension = path.rpartition(".")[2].lower()
            file = tar.extractfile(member) if member.isfile() else None
            if file and (extension in extensions or path.endswith("/copyright")):
                content = file.read()
                yield from inner(path, content) if extension in ARCHIVES else [(path, content)]


def inner(path: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of the sounds inside an archive."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile:
        return
    for name in sorted(archive.namelist()):
        if name.rpartition(".")[2].lower() in AUDIO + MODULES + MIDI:
            yield f"{path}/{name}", archive.read(name)


def embedded(content: bytes) -> Iterator[bytes]:
    """Yield the wav and Ogg files inside a container of unknown format."""
    for found in re.finditer(rb"RIFF....WAVE|OggS\x00\x02", content, re.S):
        start = end = found.start()
        if found[0].startswith(b"RIFF"):
            yield content[start : start + 8 + int.from_bytes(content[start + 4 : start + 8], "little")]
            continue
        while content[end : end + 4] == b"OggS":
            last = content[end + 5] & 4
            n_segments = content[end + 26]
            end += 27 + n_segments + sum(content[end + 27 : end + 27 + n_segments])
            if last:
                break
        yield content[start:end]


def decode(content: bytes, extension: str) -> Floats:
    """Return up to ``MAX_S`` seconds of a sound, mono at 16 kHz."""
    import av

    if extension in MODULES:
        with tempfile.NamedTemporaryFile(suffix=f".{extension}") as file:
            file.write(content)
            file.flush()
            command = ["ffmpeg", "-v", "quiet", "-i", file.name, "-t", str(MAX_S), "-ac", "1", "-ar", str(SAMPLE_RATE)]
            run = subprocess.run([*command, "-f", "f32le", "pipe:"], capture_output=True, check=True)
        return np.frombuffer(run.stdout, np.float32)
    raw = extension if extension in ("g722", "gsm", "alaw") else None
    chunks, n_samples = [], 0
    with av.open(io.BytesIO(content), "r", raw, metadata_errors="ignore") as container:
        stream = container.streams.audio[0]
        stream.thread_count = 1
        resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
        for frame in container.decode(stream):
            frame.pts = None
            for out in resampler.resample(frame):
                chunks.append(out.to_ndarray()[0])
                n_samples += len(chunks[-1])
            if n_samples > MAX_S * SAMPLE_RATE:
                break
        chunks += [out.to_ndarray()[0] for out in resampler.resample(None)]
    return np.concatenate(chunks)[: int(MAX_S * SAMPLE_RATE)] if chunks else np.zeros(0, np.float32)


def encode(path: Path, wav: Floats, bit_rate: int = BIT_RATE) -> None:
    """Write mono 16 kHz Opus."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=SAMPLE_RATE, layout="mono", bit_rate=bit_rate)
        stream.codec_context.options = {"vbr": "on", "frame_duration": "40", "compression_level": "5"}
        frame = av.AudioFrame.from_ndarray(wav[None].astype(np.float32), format="flt", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def trim(wav: Floats) -> Floats:
    """Cut silence, 60 dB below the peak, from both ends; nothing is left of a silent or very short clip."""
    peak = np.abs(wav).max(initial=0)
    if not np.isfinite(peak) or peak < 1e-3:
        return wav[:0]
    loud = np.flatnonzero(np.abs(wav) > 1e-3 * peak)
    wav = wav[max(loud[0] - 160, 0) : loud[-1] + 800]
    return wav if len(wav) >= MIN_S * SAMPLE_RATE else wav[:0]


def sounds_of(path: str, content: bytes, kind: str, folder: Path) -> Iterator[tuple[str, str, Floats]]:
    """Yield name, kind and samples of each sound in a file of a package."""
    extension = path.rpartition(".")[2].lower()
    if extension in FONTS:
        yield from font_sounds(path, content, kind, folder)
    elif extension in MIDI:
        fonts = sorted(folder.parent.glob("fonts/*.sf2"))
        font = fonts[int(hashlib.sha256(content).hexdigest(), 16) % len(fonts)]
        yield f"{path}#{font.stem}", "music", rendered(font, content, folder, MAX_S)
    elif extension in CONTAINERS:
        for number, file in enumerate(embedded(content)):
            wav = decode(file, "")
            yield f"{path}#{number}", kind_of(f"/{path}", kind, len(wav) / SAMPLE_RATE), wav
    elif extension in AUDIO + MODULES:
        wav = decode(content, extension)
        own = "music" if extension in MODULES else kind_of(f"/{path}", kind, len(wav) / SAMPLE_RATE)
        yield path, own, wav


def rendered(font: Path, midi: bytes, folder: Path, seconds: float) -> Floats:
    """Return a MIDI file played by a SoundFont, at 16 kHz."""
    import soxr

    played = np.asarray(soundfonts.render(font, midi, folder, seconds) / 2**15, np.float32)
    return np.asarray(soxr.resample(played, soundfonts.RATE, SAMPLE_RATE), np.float32)


def font_sounds(path: str, content: bytes, kind: str, folder: Path) -> Iterator[tuple[str, str, Floats]]:
    """Yield the notes, phrases and hits of a SoundFont."""
    font = folder / Path(path).name
    font.write_bytes(content)
    for bank, program, _ in soundfonts.presets(content):
        events, slots = soundfonts.preset_events(bank, program, kind)
        midi = soundfonts.midi_file(events)
        played = rendered(font, midi, folder, slots[-1].start + 4)
        for slot in slots:
            cut = played[int(slot.start * SAMPLE_RATE) : int((slot.start + slot.seconds) * SAMPLE_RATE)]
            yield f"{path}#{slot.name}", "drums" if kind == "drums" or bank == soundfonts.DRUMS else "notes", cut
    font.unlink()


def take(package: str, kind: str, folder: Path, refused: tuple[str, ...], wanted: Package | None) -> Package:
    """Write a package's sounds into FOLDER/audio, and return its record.

    With ``wanted``, write the sounds that it names and no others.
    """
    made = folder / "packages" / f"{package}.json"
    if made.exists():
        record = json.loads(made.read_text())
        return Package(**{**record, "sounds": [Sound(**sound) for sound in record["sounds"]]})
    made.parent.mkdir(parents=True, exist_ok=True)
    names = {sound.path: sound for sound in wanted.sounds} if wanted else {}
    wanted_paths = {path.partition("#")[0] for path in names}
    taken: list[Sound] = []
    failed: Counter[str] = Counter()
    total: dict[str, float] = defaultdict(float)
    seen: set[str] = set()
    copyright_text = ""
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{package}-") as name:
        work = Path(name)
        deb = download(package, work)
        version = deb.name.split("_")[1].replace("%3a", ":")
        result = Package(package, version, hashlib.sha256(deb.read_bytes()).hexdigest())
        if wanted and result.sha256 != wanted.sha256:
            logger.warning("%s: expected version %s, got %s", package, wanted.version, result.version)
        for path, content in members(deb):
            if path.endswith("/copyright"):
                copyright_text = content.decode("utf-8", "replace")
                continue
            sha256 = hashlib.sha256(content).hexdigest()[:32]
            if wanted and path not in wanted_paths:
                continue
            if sha256 in seen or any(word.lower() in path.lower() for word in refused):
                continue
            seen.add(sha256)
            try:
                for source, own, wav in sounds_of(path, content, kind, work):
                    number = len(taken) + 1
                    if wanted and source not in names:
                        continue
                    wav = trim(wav)
                    seconds = len(wav) / SAMPLE_RATE
                    if not len(wav) or total[own] + seconds > MAX_PACKAGE_S:
                        continue
                    total[own] += seconds
                    sound = Sound(f"{own}/{package}-{number:05}", sha256, round(seconds, 2), source)
                    if wanted:
                        sound.name = names[source].name
                        if sound.sha256 != names[source].sha256:
                            logger.warning("%s: %s differs from the manifest", package, source)
                    encode(folder / "audio" / f"{sound.name}.opus", wav)
                    taken.append(sound)
            except Exception as error:  # some files of games are not what their names say
                failed[type(error).__name__] += 1
    result.sounds = taken
    result.licences = licences(copyright_text, (sound.path.partition("#")[0] for sound in result.sounds))
    write_whole(made, as_text(lambda file: json.dump(asdict(result), file)))
    if wanted and len(taken) < len(names):
        logger.warning("%s: expected %d sounds, got %d", package, len(names), len(taken))
    hours = {kind: round(seconds / 3600, 3) for kind, seconds in total.items()}
    logger.info("%s: %d files, hours %s%s", package, len(taken), hours, f", failed {dict(failed)}" if failed else "")
    return result


def prints_of(cache: Path, files: list[Path]) -> list[Floats]:
    """Return the prints of sound files, kept in a file for the next call."""
    if not cache.exists():
        clips = [prints(trim(decode(file.read_bytes(), file.suffix[1:]))) for file in files]
        flat = np.concatenate([np.zeros((0, SIZE), np.float32), *clips]).astype(np.float16)
        lengths = np.array([len(clip) for clip in clips], int)
        cache.parent.mkdir(exist_ok=True)
        write_whole(cache, lambda file: np.savez(file, flat=flat, lengths=lengths))
    with np.load(cache) as stored:
        return np.split(stored["flat"].astype(np.float32), np.cumsum(stored["lengths"])[:-1])


def listed() -> dict[str, str]:
    """Return the kind of each package to take."""
    lines = PACKAGES.read_text(encoding="utf-8").splitlines()
    return dict(line.split() for line in lines if line and not line.startswith("#"))


def get_fonts(folder: Path) -> None:
    """Fetch the SoundFonts that play MIDI files."""
    for package in MIDI_FONTS:
        if not list((folder / "fonts").glob(f"{package}*.sf2")):
            with tempfile.TemporaryDirectory(dir=folder) as name:
                for path, content in members(download(package, Path(name))):
                    if path.endswith(".sf2"):
                        (folder / "fonts").mkdir(exist_ok=True)
                        (folder / "fonts" / f"{package}-{Path(path).stem}.sf2").write_bytes(content)


def take_all(
    folder: Path, kinds: dict[str, str], refused: tuple[str, ...], wanted: dict[str, Package], jobs: int
) -> list[Package]:
    """Take packages, several at a time, the small ones first; return them in the order of ``kinds``."""
    get_fonts(folder)
    known = versions_and_sizes(kinds)
    for name in set(kinds) - set(known):
        logger.warning("%s: apt knows no such package", name)
    done = {}
    with ProcessPoolExecutor(jobs) as pool:
        small_first = sorted(known, key=lambda name: known[name][1])
        futures = {
            pool.submit(take, name, kinds[name], folder, refused, wanted.get(name)): name for name in small_first
        }
        for future in as_completed(futures):
            try:
                done[futures[future]] = future.result()
            except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
                logger.warning("%s: %r", futures[future], error)
    return [done[name] for name in kinds if name in done]


def choose(folder: Path, packages: list[Package], tasks: Path, jobs: int) -> None:
    """Drop what repeats a clip of a task, or an earlier sound of the corpus."""
    clips: dict[str, list[Path]] = {}
    for table in sorted(tasks.glob("*/*.csv")):
        with open(table, newline="", encoding="utf-8") as file:
            clips[f"task-{table.stem}"] = [table.parent / "audio" / row["file_name"] for row in csv.DictReader(file)]
    for package in packages:
        clips[package.name] = [folder / "audio" / f"{sound.name}.opus" for sound in package.sounds]
    with ProcessPoolExecutor(jobs) as pool:
        cache = folder / "prints"
        futures = {name: pool.submit(prints_of, cache / f"{name}.npz", files) for name, files in clips.items()}
        found = {name: future.result() for name, future in futures.items()}
    of_tasks = [one for name, clip in found.items() if name.startswith("task-") for one in clip]
    kept: dict[bool, list[tuple[Floats, Package, Sound]]] = {True: [], False: []}  # drum hits and others
    seen: set[str] = set()
    for package in packages:
        repeats = near_duplicates(found[package.name], of_tasks, MATCH_TASK)
        before = len(package.sounds)
        for number, sound in enumerate(package.sounds):
            again = "#" not in sound.path and sound.sha256 in seen
            seen.add(sound.sha256)
            if not again and number not in repeats and len(found[package.name][number]):
                hit = sound.name.startswith("drums/")
                kept[hit].append((found[package.name][number], package, sound))
        logger.info("%s: %d of %d repeat a clip of a task", package.name, len(repeats), before)
        package.sounds = []
    for hit, clips_left in kept.items():
        repeats = near_duplicates([clip for clip, _, _ in clips_left], least=MATCH_HITS if hit else MATCH)
        for number, (_, package, sound) in enumerate(clips_left):
            if number not in repeats:
                package.sounds.append(sound)
        logger.info("%s: %d of %d repeat another", "hits" if hit else "others", len(repeats), len(clips_left))


def manifest_lines(packages: Iterable[Package]) -> Iterator[str]:
    """Yield the lines of the manifest: a package, then its sounds."""
    for package in packages:
        if package.sounds:
            fields = ("package", package.name, package.version, package.sha256, " | ".join(package.licences))
            yield "\t".join(fields)
            for sound in package.sounds:
                yield "\t".join((sound.name, sound.sha256, f"{sound.seconds:.2f}", sound.path))


def parse_manifest(lines: Iterable[str]) -> list[Package]:
    """Read the lines of a manifest."""
    packages: list[Package] = []
    for line in lines:
        fields = line.rstrip("\n").split("\t")
        if fields[0] == "package":
            packages.append(Package(fields[1], fields[2], fields[3], fields[4].split(" | ")))
        else:
            packages[-1].sounds.append(Sound(fields[0], fields[1], float(fields[2]), fields[3]))
    return packages


def refused_words(tasks: Path) -> tuple[str, ...]:
    """Return the names of packages and kits that a task's valid or test split has, and of those kept for tests."""
    words = {*KEPT_FOR_TESTS, *OF_TEST_AUTHORS}
    for table in tasks.glob("*/*.csv"):
        with open(table, newline="", encoding="utf-8") as file:
            words |= {row["group"] for row in csv.DictReader(file) if row.get("split") in ("valid", "test")}
    return tuple(sorted(words))


def summary(packages: Iterable[Package]) -> str:
    """Return hours, files and packages of each kind."""
    seconds: dict[str, float] = defaultdict(float)
    files: Counter[str] = Counter()
    sources: dict[str, set[str]] = defaultdict(set)
    for package in packages:
        for sound in package.sounds:
            kind = sound.name.partition("/")[0]
            seconds[kind] += sound.seconds
            files[kind] += 1
            sources[kind].add(package.name)
    rows = [
        f"{kind}: {seconds[kind] / 3600:.1f} h, {files[kind]} files, {len(sources[kind])} packages"
        for kind in sorted(files)
    ]

    return "\n".join([*rows, f"all: {sum(seconds.values()) / 3600:.1f} h, {sum(files.values())} files"])


def main() -> None:
    """Build the corpus, or choose it anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--renew", type=Path, metavar="TASKS", help="choose sounds and write the manifest")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="packages; may hold * and ?")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.renew:
        refused = refused_words(args.renew)
        kinds, wanted = listed(), {}
        named = [name for name in kinds if any(word.lower() in name for word in refused)]
        if named:
            parser.error(
                f"{PACKAGES.name}: expected no package of a task's valid or test split, got {', '.join(named)}"
            )
    else:
        with lzma.open(MANIFEST, "rt", encoding="utf-8") as file:
            wanted = {package.name: package for package in parse_manifest(file)}
        refused, kinds = (), {name: kind for name, kind in listed().items() if name in wanted}
    kinds = {name: kind for name, kind in kinds.items() if any(fnmatch.fnmatch(name, one) for one in args.only)}
    packages = take_all(args.folder, kinds, refused, wanted, args.jobs)
    if args.renew:
        choose(args.folder, packages, args.renew, args.jobs)
        text = "\n".join(manifest_lines(packages)) + "\n"
        write_whole(
            args.folder / MANIFEST.name,
            lambda file: file.write(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)),
        )
    print(summary(packages))


if __name__ == "__main__":
    main()
