"""The lines about the data that `lite-orpo train` begins with."""

import json
import sys
import time
from pathlib import Path

import pytest

from lite_orpo.cli.main import run
from lite_orpo.cli.quick_check import print_quick_check

ROOT = Path(__file__).parents[2]
GOOD = [
    {"prompt": f"Question {i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Spoken:
    """A console that keeps what is printed."""

    quiet = False

    def __init__(self):
        self.lines = []

    def print(self, text, **_):
        self.lines.append(str(text))


def test_train_begins_with_three_lines_about_its_data(tmp_path):
    from lite_orpo.data.files.sources import open_source

    rows = [*GOOD, *GOOD[:2], {"prompt": "a", "chosen": None, "rejected": "b"}]
    pairs = open_source(str(write(tmp_path / "pairs.jsonl", rows)), split="train")
    console = Spoken()
    print_quick_check(console, pairs, pairs)
    assert len(console.lines) == 3
    first, second, third = console.lines
    assert "32 pairs, 1 row cannot be trained on: text" in first
    assert "serious: prompts in both" in first
    assert "2 duplicate pairs" in second and "held-out prompts also trained on" in second
    assert "chosen is longer in 100%" in third


def test_nothing_is_said_of_held_out_pairs_for_which_there_was_no_time(tmp_path, monkeypatch):
    from lite_orpo.cli import quick_check
    from lite_orpo.data.files.sources import LocatedRow, RowSource

    def slow():
        yield from (LocatedRow(f"row {i}", row) for i, row in enumerate(GOOD))
        time.sleep(0.3)

    monkeypatch.setattr(quick_check, "MAX_SECONDS", 0.2)
    console = Spoken()
    held_out = RowSource("held-out", lambda: iter([LocatedRow("row 0", GOOD[0])]), 1)
    print_quick_check(console, RowSource("rows", slow, None), held_out)
    assert console.lines[0].split("Check ")[1].startswith("30 pairs: text")
    assert "held-out" not in " ".join(console.lines)


def test_the_look_at_the_data_never_stops_a_run(tmp_path, caplog):
    from lite_orpo.data.files.sources import LocatedRow, RowSource

    def explode():
        yield LocatedRow("row 0", GOOD[0])
        raise ZeroDivisionError("a bug of somebody's")

    console = Spoken()
    print_quick_check(console, RowSource("rows", explode, None), None)
    assert console.lines == [] and "was not checked: ZeroDivisionError" in caplog.text
    print_quick_check(console, RowSource("rows", lambda: iter([]), 0), None)
    assert console.lines == []


def test_train_prints_the_lines_before_it_loads_the_model(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        sys,
        "argv",
        ["lite-orpo", "train", "examples/demo.yaml", f"output_dir={tmp_path / 'out'}"]
        + ["model_name_or_path=./no_such_model"],
    )
    with pytest.raises(SystemExit):
        run()
    captured = capsys.readouterr()
    assert captured.out.count("Check ") == 3 and "no_such_model" in captured.err
