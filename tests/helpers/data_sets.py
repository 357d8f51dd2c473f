"""Tiny trees of files in the layouts of public data sets."""

from __future__ import annotations

import json


def write(root, files: dict[str, str]):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


TREES = {
    "folders": {f"{name}.wav": "" for name in ("kick/a", "kick/b/b", "kick/c", "snare/a")} | {"kick/notes.txt": ""},
    "speech_commands": {
        **{f"{word}/{who}_nohash_0.wav": "" for word in ("yes", "no") for who in ("aa", "bb", "cc")},
        "_background_noise_/pink_noise.wav": "",
        "validation_list.txt": "yes/bb_nohash_0.wav\nno/bb_nohash_0.wav\n",
        "testing_list.txt": "yes/cc_nohash_0.wav\n",
        "README.md": "",
    },
    "urbansound8k": {
        "metadata/UrbanSound8K.csv": "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
        "1-3-0-0.wav,1,0.0,0.3,1,5,3,dog_bark\n2-2-0-0.wav,2,0,4,1,10,2,children_playing\n",
        "audio/fold5/1-3-0-0.wav": "",
        "audio/fold10/2-2-0-0.wav": "",
    },
    "esc50": {
        "meta/esc50.csv": "filename,fold,target,category,esc10,src_file,take\n"
        "1-1-A-0.wav,1,0,dog,True,1,A\n5-2-A-40.wav,5,40,helicopter,True,2,A\n",
        "audio/1-1-A-0.wav": "",
        "audio/5-2-A-40.wav": "",
    },
    "nsynth": {
        f"nsynth-{part}/examples.json": json.dumps(
            {f"{family}_acoustic_00{n}-060-100": {"instrument_family_str": family} for family in ("bass", "reed")}
        )
        for n, part in enumerate(("train", "valid", "test"))
    },
    "fsd50k": {
        "FSD50K.ground_truth/dev.csv": "fname,labels,mids,split\n"
        '64760,"Electric_guitar,Guitar,Music","/m/1,/m/2,/m/3",train\n16399,Dog,/m/4,val\n',
        "FSD50K.ground_truth/eval.csv": 'fname,labels,mids\n37199,"Guitar,Music","/m/2,/m/3"\n',
    },
}
