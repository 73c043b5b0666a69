"""The benchmark of whole steps runs here at a tiny size; its baseline is TRL's loss."""

import argparse
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
# Scripts in a folder are no package: they find each other as they do when run.
sys.path.insert(0, str(BENCHMARKS))
import pair_lengths  # noqa: E402
import step_time  # noqa: E402
from pair_lengths import PairLength, padded_tokens, read_lengths, shared_tokens  # noqa: E402
from step_methods import FULL_LOGITS, OURS, PADDED, TRL, Stepper  # noqa: E402

METHODS = [OURS, PADDED, FULL_LOGITS, TRL]


def specification(**changes):
    return {
        "work": "time",
        "methods": METHODS,
        "lengths": "hh_rlhf",
        "pairs": 3,
        "rounds": 2,
        "device": "cpu",
        "dtype": "fp32",
        "model": "tiny",
        "row_settings": {},
        "threads": torch.get_num_threads(),
        **changes,
    }


def stepper(method, tmp_path):
    lengths = read_lengths("hh_rlhf")
    made = Stepper(method, specification(), lengths, list(lengths.batches(3, 1)), str(tmp_path))
    with torch.no_grad():
        # Logits of a few nats, so that the odds ratio weighs something.
        made.trainer.model.get_output_embeddings().weight.mul_(40)
    return made


def test_the_plain_loop_has_trls_loss_and_gradients(tmp_path):
    found = {}
    for method in (FULL_LOGITS, TRL):
        made = stepper(method, tmp_path)
        loss = float(made.trainer.forward_and_backward(made.trainer.examples[:3]))
        found[method] = loss, torch.cat([p.grad.flatten() for p in made.parameters])
    (loss, gradient), (their_loss, their_gradient) = found.values()
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert float((gradient - their_gradient).norm()) <= 1e-5 * float(their_gradient.norm())
    assert float(their_gradient.norm()) > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_methods_compute_the_same_from_the_tokens_of_the_set(dtype):
    rounds = step_time.work(specification(dtype=dtype))["rounds"]
    step_time.check_same_work(rounds, step_time.TOLERANCES[dtype])
    batches = list(read_lengths("hh_rlhf").batches(3, 2))
    for batch, takes in zip(batches, rounds, strict=True):
        assert takes[OURS]["tokens"] == shared_tokens(batch)
        assert takes[TRL]["tokens"] == takes[FULL_LOGITS]["tokens"] == padded_tokens(batch)
        separate = sum(pair.separate for pair in batch)
        assert separate <= takes[PADDED]["tokens"] <= padded_tokens(batch)
        assert all(take["seconds"] > 0 for take in takes.values())


def test_a_step_begins_from_the_same_weights_each_time(tmp_path):
    made = stepper(OURS, tmp_path)
    first, second = made.take(0), made.take(0)
    assert (first["loss"], first["norm"]) == (second["loss"], second["norm"])


def test_memory_is_told_by_a_process_of_its_own():
    got = step_time.work(specification(work="memory", methods=[PADDED]))
    assert got["peak_mib"] >= got["resident_before_mib"] > 0
    assert got["tokens"] > 0


def test_a_gpu_is_waited_for_and_asked_for_its_memory(tmp_path, monkeypatch):
    made, asked = stepper(OURS, tmp_path), []
    made.is_cuda = True
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: asked.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12 * 2**20)
    assert made.take(0)["extra_mib"] == 7.0
    assert asked == ["synchronize", "reset_peak_memory_stats", "synchronize"]


def test_methods_that_differ_have_no_figures():
    right = {"loss": 9.8, "norm": 0.5}
    for wrong in ({**right, "loss": 9.802}, {**right, "norm": 0.51}, {**right, "loss": torch.nan}):
        with pytest.raises(RuntimeError, match="round 2: (loss|norm) differs"):
            step_time.check_same_work(
                [{OURS: right, TRL: right}, {OURS: right, TRL: wrong}], step_time.TOLERANCES["fp32"]
            )


def test_the_script_prints_a_table_and_writes_its_figures(tmp_path):
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "step_time.py"), "--cells", "hh_rlhf:2", "--model"]
        + ["tiny", "--baseline", "full_logits", "--memory", "none", "--rounds", "2"]
        + ["--threads", "1", "--json", str(file)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    cell = document["cells"]["hh_rlhf:2"]
    assert list(cell["methods"]) == [OURS, PADDED, FULL_LOGITS]
    for method, figures in cell["methods"].items():
        assert method in done.stdout
        assert figures["seconds"]["median"] > 0 and len(cell["takes"]) == 2
    assert cell["methods"][FULL_LOGITS]["tokens_over_ours"]["median"] > 1.2
    assert {"commit", "versions"} <= set(document["provenance"])


WITHOUT = """
import importlib.abc, importlib.util, json, sys
BLOCKED = {"datasets", "trl", "rich", "bitsandbytes"}
true_find_spec = importlib.util.find_spec

def find_spec(name, package=None):
    return None if name.split(".")[0] in BLOCKED else true_find_spec(name, package)

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

importlib.util.find_spec = find_spec
sys.meta_path.insert(0, Block())
import step_time
from step_methods import OURS, PADDED

methods = [OURS, PADDED, step_time._baseline("auto")]
rounds = step_time.work({**json.loads(sys.argv[1]), "methods": methods})["rounds"]
step_time.check_same_work(rounds, step_time.TOLERANCES["fp32"])
assert BLOCKED.isdisjoint(sys.modules)
print(*rounds[0])
"""


def test_it_runs_where_trl_datasets_and_rich_are_missing(tmp_path):
    paths = os.pathsep.join(str(path) for path in (BENCHMARKS, ROOT, ROOT / "kernels"))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, json.dumps(specification(rounds=1, pairs=1))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().endswith(FULL_LOGITS)


def test_cells_are_read_and_wrong_ones_refused():
    assert step_time.parse_cell("hh_rlhf:4") == step_time.Cell("hh_rlhf", 4)
    for text in ("hh_rlhf", "hh_rlhf:0", "hh_rlhf:x", "other:4", "hh_rlhf:-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="give one of"):
            step_time.parse_cell(text)


@pytest.mark.parametrize(
    ("name", "means", "sharing"),
    [
        ("hh_rlhf", (117, 40, 47), 1.57),
        ("ultrafeedback_like", (125, 320, 290), 1.17),
        ("long_prompt", (1024, 128, 128), 1.8),
    ],
)
def test_committed_lengths_are_what_they_say(name, means, sharing):
    lengths = read_lengths(name)
    assert lengths.means() == pytest.approx(means, abs=1)
    assert lengths.sharing_ratio() == pytest.approx(sharing, abs=0.01)
    assert lengths.name == name and min(map(min, lengths.pairs)) >= 2
    assert max(pair.longer_sequence for pair in lengths.pairs) <= 1152
    assert ("SYNTHETIC" in lengths.source) == (name != "hh_rlhf")


@pytest.mark.parametrize("name", ["ultrafeedback_like", "long_prompt"])
def test_synthetic_lengths_can_be_made_again(name, tmp_path):
    file = tmp_path / "again.json"
    pair_lengths.write_lengths(getattr(pair_lengths, name)(), file)
    assert file.read_text() == (pair_lengths.FOLDER / f"{name}.json").read_text()


def test_transcripts_are_split_behind_the_last_shared_turn_and_counted(tmp_path):
    shared = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"
    row = {"chosen": f"{shared} yes\n\nHuman: d\n\nAssistant: e", "rejected": f"{shared} yet"}
    assert pair_lengths.split_transcripts(row) == (
        shared,
        " yes\n\nHuman: d\n\nAssistant: e",
        " yet",
    )
    with pytest.raises(ValueError, match="share no"):
        pair_lengths.split_transcripts({"chosen": "a", "rejected": "b"})
    file = tmp_path / "transcripts.jsonl.gz"
    file.write_bytes(gzip.compress((json.dumps(row) + "\n").encode() * 3))
    made = pair_lengths.hh_rlhf(file)
    assert len(made.pairs) == 3 and "yes" not in json.dumps(made)
    assert made.pairs[0].chosen > made.pairs[0].rejected >= 2
    pair_lengths.write_lengths(made, tmp_path / "made.json")
    assert json.loads((tmp_path / "made.json").read_text())["pairs"][0] == list(made.pairs[0])


def test_ratios_of_tokens():
    batch = [PairLength(10, 4, 2), PairLength(3, 1, 7)]
    assert (padded_tokens(batch), shared_tokens(batch)) == (56, 27)
    lengths = pair_lengths.LengthSet("two", "a test", batch)
    assert lengths.sharing_ratio() == 40 / 27
    assert 40 / 27 < lengths.padding_ratio(1) < lengths.padding_ratio(4)
