"""Draw a map of a folder of sounds: a web page of points, near where they sound alike; a click plays the sound.

    byola-fast embed my_sounds/ --normalize --out embeddings.npz
    python examples/sound_map.py embeddings.npz my_sounds/ map.html

The colour is the folder. The page needs no other file and no network: it holds the first seconds of each sound as MP3.
"""

from __future__ import annotations

import base64
import html
import io
import json
import sys
from pathlib import Path

import numpy as np
import soundfile
from sklearn.manifold import TSNE

import byola_fast

PAGE = """<!doctype html>
<meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px sans-serif; margin: 1em }} circle {{ cursor: pointer; stroke: white; stroke-width: .2 }}
circle:hover, circle.played {{ stroke: black; stroke-width: .5 }} svg {{ height: 85vh }} span {{ margin-right: 1em }}
</style>
<div>{legend}<b id="name">click a point</b></div>
<svg viewBox="-2 -2 104 104">{points}</svg>
<script>
const sounds = {sounds};
const player = new Audio();
document.querySelector("svg").addEventListener("click", event => {{
  const point = event.target.closest("circle");
  if (!point) return;
  document.querySelectorAll(".played").forEach(other => other.classList.remove("played"));
  point.classList.add("played");
  document.getElementById("name").textContent = point.textContent;
  player.src = "data:audio/mpeg;base64," + sounds[point.dataset.n];
  player.play();
}});
</script>
"""


def mp3(path: Path, seconds: float) -> str:
    """Return the beginning of a file as MP3 in base64."""
    wav = byola_fast.read_audio(path, 16000)[: round(16000 * seconds)]
    file = io.BytesIO()
    soundfile.write(file, wav.numpy().clip(-1, 1), 16000, format="MP3")
    return base64.b64encode(file.getvalue()).decode()


def main(table: str, folder: str, page: str, seconds: float = 3.0) -> None:
    with np.load(table) as content:
        names, rows = content["file_names"].tolist(), content["embeddings"]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9)
    places = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=0).fit_transform(rows)
    places = 100 * (places - places.min(0)) / np.ptp(places, axis=0).clip(1e-9)

    groups = sorted({str(Path(name).parent) for name in names})
    colours = {group: f"hsl({360 * n / len(groups):.0f} 70% 45%)" for n, group in enumerate(groups)}
    points = "".join(
        f'<circle r="1" cx="{x:.2f}" cy="{y:.2f}" fill="{colours[str(Path(name).parent)]}" data-n="{n}">'
        f"<title>{html.escape(name)}</title></circle>"
        for n, (name, (x, y)) in enumerate(zip(names, places, strict=True))
    )
    legend = "".join(f'<span style="color:{colours[group]}">&#9679; {html.escape(group)}</span>' for group in groups)
    sounds = json.dumps([mp3(Path(folder, name), seconds) for name in names])
    text = PAGE.format(title=html.escape(f"Map of {folder}"), legend=legend, points=points, sounds=sounds)
    Path(page).write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"{page}: {len(names)} sounds of {len(groups)} folders; open it in a browser")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3])
