"""The pairs that a configuration names: split, held-out split and mapping reach the loader."""

import json

import pytest

from lite_orpo.cli.train import open_sources
from lite_orpo.config.run_config import load_run_config
from lite_orpo.data.formats.rows import parse_row
from lite_orpo.errors import DataError


@pytest.fixture
def sources(tmp_path):
    def open_from(text):
        path = tmp_path / "config.yaml"
        path.write_text(f"output_dir: {tmp_path}/out\nuse_cpu: true\n{text}\n")
        return open_sources(load_run_config(path, {}))

    return open_from


def write(path, *prompts):
    path.parent.mkdir(exist_ok=True)
    rows = [{"query": prompt, "good": "a", "bad": "b"} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


MAPPING = "column_mapping: {prompt: query, chosen: good, rejected: bad}"


def test_one_mapping_serves_training_and_held_out_pairs(sources, tmp_path):
    write(tmp_path / "pairs" / "train.jsonl", "q1", "q2")
    write(tmp_path / "pairs" / "test.jsonl", "q3")
    train, held_out = sources(f"dataset_name: {tmp_path}/pairs\n{MAPPING}")
    assert [parse_row(row).prompt for _, row in train.read()] == ["q1", "q2"]
    assert [parse_row(row).prompt for _, row in held_out.read()] == ["q3"]


def test_a_folder_without_held_out_pairs_has_none(sources, tmp_path):
    write(tmp_path / "pairs" / "train.jsonl", "q1")
    assert sources(f"dataset_name: {tmp_path}/pairs\n{MAPPING}").held_out is None


def test_held_out_shards_that_are_incomplete_are_not_taken_for_none(sources, tmp_path):
    write(tmp_path / "pairs" / "train.jsonl", "q1")
    write(tmp_path / "pairs" / "test-00000-of-00002.jsonl", "q2")
    with pytest.raises(DataError, match="1 of the 2 shards of 'test' are there"):
        sources(f"dataset_name: {tmp_path}/pairs\n{MAPPING}")


def test_a_mapping_turned_round_is_refused_before_anything_is_read(sources, tmp_path):
    write(tmp_path / "pairs.jsonl", "q1")
    with pytest.raises(DataError, match="write prompt: query"):
        sources(f"dataset_name: {tmp_path}/pairs.jsonl\ncolumn_mapping: {{query: prompt}}")
