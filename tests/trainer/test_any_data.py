"""The trainer takes what people have: unusual files, streams, generators, dictionaries of sets."""

import json

import datasets
import pytest
import torch
from bad_input_outcomes import DECIDED_BY_THE_TOKENIZER, FOLDER, KEPT, REFUSED
from tiny_models import plain_rows, quiet_config, tiny_model
from tiny_tokenizer import CHATML, char_tokenizer

from lite_orpo import ORPOTrainer
from lite_orpo.data.files.sources import dataset_source, open_source
from lite_orpo.errors import DataError

TOKENIZER = char_tokenizer(template=CHATML)
ROWS = plain_rows(4)


def trained(output_dir, rows, **settings):
    eval_dataset = settings.pop("eval_dataset", None)
    trainer = ORPOTrainer(
        model=tiny_model(),
        args=quiet_config(output_dir, **{"max_steps": 1, "max_length": 64, **settings}),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=TOKENIZER,
    )
    trainer.train()
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    return trainer


@pytest.mark.parametrize("name", [*KEPT, *sorted(DECIDED_BY_THE_TOKENIZER)])
def test_an_unusual_file_trains_to_finite_weights(tmp_path, name):
    trained(tmp_path, open_source(str(FOLDER / name), split="train"))


# What comes behind these is not read: the file itself is refused.
END_THE_FILE = {"bad_line.jsonl", "deep.jsonl", "key_twice.jsonl", "latin1.jsonl"}
BAD_ROWS = sorted(name for name in set(REFUSED) - END_THE_FILE if name.endswith(".jsonl"))


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_among_good_ones_are_left_out_and_leave_every_weight_finite(tmp_path, name):
    bad = (FOLDER / name).read_bytes().strip().splitlines()
    good = [json.dumps(row).encode() for row in plain_rows(60)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*good, *bad, *good]))
    trainer = trained(tmp_path, open_source(str(path), split="train"), max_steps=3)
    (report,) = trainer.data_reports
    assert report.kept + report.dropped == 120 + len(bad)
    assert report.dropped >= (1 if bad else 0)


@pytest.mark.parametrize(
    "rows",
    [
        lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        lambda: (row for row in ROWS),
        lambda: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
        lambda: dataset_source("mine", [{"q": "a", **ROWS[0]}], {"prompt": "q"}),
    ],
    ids=["iterable", "generator", "dataset-dict", "mapped"],
)
def test_rows_without_a_length_and_dictionaries_train_as_a_list_does(tmp_path, rows):
    trainer = trained(tmp_path, rows())
    assert len(trainer.train_dataset) in (1, len(ROWS))


def test_each_set_of_a_dictionary_is_evaluated_whatever_kind_it_is(tmp_path):
    sets = {"list": ROWS, "stream": datasets.Dataset.from_list(ROWS).to_iterable_dataset()}
    metrics = trained(tmp_path, ROWS, eval_dataset=sets).evaluate(sets)
    assert metrics["eval_list_loss"] == metrics["eval_stream_loss"]


def test_a_generator_given_twice_is_not_taken_for_no_rows(tmp_path):
    rows = (row for row in ROWS)
    trained(tmp_path, rows)
    with pytest.raises(DataError, match="no rows"):
        trained(tmp_path, rows)
