"""Every file of bad_inputs/ gives right rows, or one line that names file, row and column."""

import os
import subprocess
import sys

import pytest
from bad_input_outcomes import DECIDED_BY_THE_TOKENIZER, FOLDER, KEPT, REFUSED
from tiny_tokenizer import CHATML, char_tokenizer

from lite_orpo.data.files.sources import open_source
from lite_orpo.data.preparation import LengthRule, prepare_pairs
from lite_orpo.errors import DataError

TOKENIZER = char_tokenizer(template=CHATML)


def prepare(name):
    source = open_source(str(FOLDER / name), split="train")
    return prepare_pairs(source, TOKENIZER, LengthRule(64, "drop"))


def test_every_file_has_an_outcome():
    files = {path.name for path in FOLDER.iterdir()} - {"README.md"}
    assert files == {*KEPT, *REFUSED, *DECIDED_BY_THE_TOKENIZER}


@pytest.mark.parametrize("name", KEPT)
def test_an_unusual_file_gives_its_rows(name):
    prepared = prepare(name)
    assert len(prepared.dataset) == KEPT[name].kept
    assert prepared.report.dropped == 0


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_file_is_refused_by_file_row_and_column(name):
    with pytest.raises(DataError) as caught:
        prepare(name)
    message = str(caught.value)
    assert message.startswith(str(FOLDER / name))
    assert REFUSED[name].place in message
    assert REFUSED[name].words in message
    assert "\n" not in message


def test_no_message_changes_with_the_hash_seed():
    script = (
        "import sys; sys.path[:0] = sys.argv[1:2]\n"
        "from test_bad_inputs import REFUSED, prepare\n"
        "for name in REFUSED:\n"
        "    try: prepare(name)\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    folder = os.path.dirname(__file__)
    outputs = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, folder],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].count("DataError") == len(REFUSED)
