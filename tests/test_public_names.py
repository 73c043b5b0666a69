"""Names that are written or shown say nothing of whose machine it was."""

import pytest

from lite_orpo.public_names import public_name, short_name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("someone/model", "someone/model"),
        ("/home/ann/models/base", "base"),  # there or not
        ("/home/ann/pairs.jsonl", "pairs.jsonl"),
    ],
)
def test_of_a_local_path_people_read_its_last_part(name, shown):
    assert short_name(name) == shown


def test_a_relative_path_that_is_there_is_a_local_one(tmp_path, monkeypatch):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert short_name("runs/mine") == "mine"
    assert public_name("runs/mine") == "runs/mine"


def test_what_is_read_back_cannot_be_taken_for_a_hub_name():
    assert public_name("/home/ann/base") == "./base"
