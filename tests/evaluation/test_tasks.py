"""Task files: kinds of CSV that are read, and what is refused."""

from __future__ import annotations

import os

import pytest

from byola_fast.evaluation.tasks import TaskError, read_task


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name,label\na,b\n", "expected columns file_name, label, and split or fold, got file_name, label"),
        ("file_name,label,split,fold\na,b,train,1\n", "split or fold"),
        ("", "expected columns"),
        ("file_name,label,split\na,x,train\na,y,test\n", "1 files listed more than once: a"),
        ("file_name,label,split\na,x,train\nb,y,exam\n", "expected train, valid or test, got exam"),
        ("file_name,label,split\na,x,train\nb,y,valid\n", "no clip of split test"),
        ("file_name,label,fold\na,x,1\nb,y,1\n", "at least two folds, got 1"),
        ("file_name,label,fold\na,x,1\nb,y,01\nc,y,2\n", "expected each number in one spelling, got 1, 01"),
        ("file_name,label,split\na,x,train\nb,x,test\n", "at least two labels, got x"),
        ("file_name,label,split\na,x,train\nb,,test\n,y,test\n", "1 lines without file_name: 4"),
        ("file_name,label,split\na,x,train\nb\n", "1 lines without label: 3"),
        ("file_name,label,split\na,x,train\n./a,y,test\n", "1 files listed more than once: a"),
        ("file_name,label,split\nb/../a,x,train\na,y,test\n", "1 files listed more than once: a"),
        ("file_name,label,split,label\na,x,train,y\n", "expected each column once, got label more than once"),
        ("file_name,label,split\na,x,y,train\n", "line 2: expected 3 cells, as in the first line, got 4; put a label"),
        ('file_name,label,split\na,"x,train\nb,y,test\n', "line 3: not a CSV file: .*; is a quote missing"),
        ('file_name,label,split\na,"x,train\nb,y",test\n', "line 3: a line break inside a cell; is a quote missing"),
        ("file_name,label,split\na,\0x,train\n", "holds NUL bytes"),
        ("file_name|label|split\na|x|train\n", "expected columns .*, got file_name|label|split"),
    ],
)
def test_refused_tasks(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TaskError, match=words):
        read_task(tmp_path / "t.csv")


@pytest.mark.parametrize(
    "text",
    [
        "file_name;label;split\na.wav;x;train\nb.wav;y;test\n",
        "file_name\tlabel\tsplit\na.wav\tx\ttrain\nb.wav\ty\ttest\n",
        "file_name, label, split\na.wav, x, train\nb.wav, y, test\n",
        'file_name, label, split\na.wav, "x", train\n"b.wav", y , test\n',
        "\ufefffile_name,label,split\r\na.wav,x,train\r\nb.wav,y,test\r\n,,\r\n\r\n , ,\r\n",
        "file_name,label,split,,\na.wav,x,train,,\nb.wav,y,test,,,\n",
        'file_name,label,split\na.wav,"x,",train\nb.wav,", y",test\n',  # a comma alone makes no second label
    ],
)
def test_kinds_of_csv(tmp_path, text):
    (tmp_path / "t.csv").write_bytes(text.encode())
    task, left_out = read_task(tmp_path / "t.csv")
    assert (task.file_names, task.labels, task.splits) == (["a.wav", "b.wav"], [("x",), ("y",)], ["train", "test"])
    assert (left_out, task.multi_label) == ([], False)


def test_labels_with_commas_between_semicolons(tmp_path):
    (tmp_path / "t.csv").write_text("file_name;label;split\na;x,y;train\nb;y;test\n")
    assert read_task(tmp_path / "t.csv")[0].labels == [("x", "y"), ("y",)]


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"file_name,label,split\n\xe9.wav,x,train\nb.wav,\xe9,test\n")
    task, _ = read_task(tmp_path / "t.csv")
    assert os.fsencode(task.file_names[1]) == b"\xe9.wav"
    assert task.classes == ["x", "\udce9"]
