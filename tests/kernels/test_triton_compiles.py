"""Every Triton kernel in every shipped configuration compiles for cards that are not here, within
the card's shared memory, without a spilled register, with matrix instructions, with 64-bit
addresses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lite_orpo_kernels
from lite_orpo_kernels.launch_config import GPU_CLASSES, class_name

SCRIPT = Path(__file__).with_name("compile_for_cards.py")
CARDS = (80, 86, 89, 90, 100, 120, "gfx90a", "gfx942", "gfx1100", "gfx1201")
PRODUCTS = {
    "block_sums_kernel",
    "add_weighted_rows_kernel",
    "add_kept_rows_kernel",
    "direction_kernel",
    "coefficients_kernel",
}
KERNELS = PRODUCTS | {
    "fold_block_lse_kernel",
    "pair_kernel",
    "total_kernel",
    "token_gradient_kernel",
}


def compiled(what):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(lite_orpo_kernels.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, SCRIPT, str(what)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def title(found):
    flags = [name for name, is_set in found["flags"].items() if is_set]
    return f"{found['kernel']} {found['dtype']} {' '.join(flags)}"


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_every_kernel_fits_the_card(card, record_property):
    results = compiled(card)
    every_dtype = not str(card).startswith("gfx")
    assert {found["kernel"] for found in results} == (KERNELS if every_dtype else PRODUCTS)
    for found in results:
        assert found["shared_memory"] <= found["limit"], title(found)
        assert found["stack"] == 0, f"{title(found)} spills"
        assert found["narrow"] == [], f"{title(found)} multiplies indices in 32 bits"
        if found["is_product"]:
            assert sum(found["opcodes"].values()) > 0, f"{title(found)} has no matrix instruction"
    record_property("compiled_kernels", len(results))


def test_consumer_cards_have_99_kb():
    for capability in (86, 89, 120):
        assert GPU_CLASSES[class_name(*divmod(capability, 10))].shared_memory == 99 * 1024


def test_the_checks_see_what_must_not_be_shipped():
    found = {result["what"]: result for result in compiled("careless")}
    assert found["spills"]["stack"] > 0
    assert found["shared memory"]["shared_memory"] > found["shared memory"]["limit"]
    # Why Turing takes the PyTorch backend.
    assert sum(found["no matrix instructions"]["opcodes"].values()) == 0
    assert found["narrow"]["narrow"] != []


def test_every_configuration_says_whether_it_was_measured():
    for gpu_class in GPU_CLASSES.values():
        for config in (gpu_class.half, gpu_class.full):
            assert config.measured is None or len(config.measured) > 5
            # A step of the second product must not cross two blocks of logsumexps.
            assert config.logits.block_v % config.rows.block_c == 0
