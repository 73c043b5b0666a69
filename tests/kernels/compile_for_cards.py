"""Compile every Triton kernel for a GPU that is not here and print what came out, a JSON line each.

    python compile_for_cards.py 86
    python compile_for_cards.py gfx1100
    python compile_for_cards.py careless

The second compiles what must not be shipped, so that the tests see their checks fail. A process
of its own: the tests' process has the kernels in the interpreter. Nothing is run.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lite_orpo_kernels import (
    fused_filter,
    fused_head_gradients,
    fused_logprobs,
    fused_orpo,
    head_kernels,
    launch_config,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
TENSORS_OF_THE_INPUT_DTYPE = (
    "hidden_ptr",
    "weight_ptr",
    "bias_ptr",
    "weights_ptr",
    "direction_ptr",
    "coefficients_ptr",
)
INT64_TENSORS = ("target_ptr", "completion_ptr")
FLOATS = ("logit_scale", "softcap", "alpha", "temperature")
AMD_WAVE = {"gfx9": 64, "gfx1": 32}
MATRIX_OPCODES = {
    "mma.sync": r"^\s*(?:@%p\d+ )?mma\.sync\.",
    "wgmma": r"^\s*(?:@%p\d+ )?wgmma\.mma_async\.",
    "tcgen05": r"^\s*(?:@%p\d+ )?tcgen05\.mma\.",
    "mfma or wmma": r"^\s*v_(?:mfma|wmma)_",
}


def of_logits(tile, transforms, even):
    constants = {
        "BLOCK_T": tile.block_t,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "HAS_BIAS": transforms,
        "HAS_SOFTCAP": transforms,
        "EVEN_D": even,
        "stride_hd": 1,
        "stride_wd": 1,
    }
    return constants, {"num_warps": tile.warps, "num_stages": tile.stages}


def launches(gpu_class, dtype, is_nvidia=True):
    """(kernel, constants, options, is a matrix product) of each way we launch a kernel."""
    config = gpu_class.full if dtype == "fp32" else gpu_class.half
    slim = config.logits if dtype == "fp32" else gpu_class.slim or config.logits
    tile, rows = config.logits, config.rows
    common = {
        "GROUP": fused_logprobs.GROUP,
        "PRECISION": fused_logprobs.product_precision(DTYPES[dtype], is_nvidia=is_nvidia),
        "INTERPRETED": False,
    }
    headroom = {"HEADROOM": fused_logprobs.FP16_HEADROOM if dtype == "fp16" else 0.0}
    # Flags that a launch may have together: all of them, none, and no gradient.
    flags = [(True, True, True), (False, True, False)] + [(False, False, True)] * (dtype == "bf16")
    for transforms, writes, even in flags:
        constants, options = of_logits(slim if transforms else tile, transforms, even)
        constants |= {"WRITES_WEIGHTS": writes, "SKIPS_TILES": False}
        yield head_kernels.block_sums_kernel, {**common, **constants}, options, True
    if dtype != "fp16":  # the filtered form; its two kernels again, with gaps
        constants, options = of_logits(tile, False, True)
        constants |= {"HAS_BIAS": True, "WRITES_WEIGHTS": True, "SKIPS_TILES": True}
        yield head_kernels.block_sums_kernel, {**common, **constants}, options, True
        constants = {
            **common,
            **headroom,
            "BLOCK_T": tile.block_t,
            "BLOCK_D": rows.block_d,
            "BLOCK_C": rows.block_c,
            "BLOCK_V": tile.block_v,
            "stride_wd": 1,
        }
        added = {"num_warps": rows.warps, "num_stages": rows.stages}
        yield fused_filter.add_kept_rows_kernel, constants, added, True
    for transforms in (True, False):
        constants, options = of_logits(slim, transforms, True)
        yield fused_head_gradients.coefficients_kernel, {**common, **constants}, options, True
    for is_relative in (True, False):
        constants = {
            **common,
            **headroom,
            "IS_FIRST": False,
            "IS_RELATIVE": is_relative,
            "BLOCK_T": rows.block_t,
            "BLOCK_D": rows.block_d,
            "BLOCK_C": rows.block_c,
            "BLOCK_V": tile.block_v,
            "stride_wd": 1,
        }
        added = {"num_warps": rows.warps, "num_stages": rows.stages}
        yield head_kernels.add_weighted_rows_kernel, constants, added, True
    constants = {**headroom, "HAS_SOFTCAP": True, "BLOCK_D": fused_logprobs.DIRECTION_COLUMNS}
    yield head_kernels.direction_kernel, {**constants, "stride_wd": 1}, {}, False
    if dtype == "fp32":
        fold = {"BLOCK_T": fused_logprobs.FOLD_ROWS}
        yield head_kernels.fold_block_lse_kernel, fold, {}, False
        tokens = {"TOKENS": fused_orpo.TOKENS}
        yield fused_orpo.pair_kernel, tokens, {}, False
        yield fused_orpo.total_kernel, {**tokens, "PAIRS": fused_orpo.PAIRS}, {}, False
        yield fused_orpo.token_gradient_kernel, tokens, {}, False


def target_of(card):
    """An NVIDIA compute capability or an AMD architecture."""
    if isinstance(card, int):
        return GPUTarget("cuda", card, 32)
    return GPUTarget("hip", card, AMD_WAVE[card[:4]])


def compile_kernel(kernel, constants, options, dtype, card):
    """As the JIT does for aligned tensors of this dtype."""
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in TENSORS_OF_THE_INPUT_DTYPE:
            signature[name] = POINTERS[dtype]
        elif name in INT64_TENSORS:
            signature[name] = "*i64"
        elif name in ("nll_mask_ptr", "kept_ptr", "count_ptr"):
            is_list = kernel is fused_filter.add_kept_rows_kernel
            signature[name] = "*i32" if is_list else "*u8"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        # Without this loads are neither wide nor asynchronous, and tiles spill.
        if name not in constants and (name.endswith("_ptr") or name.startswith("stride_")):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): v for name, v in constants.items()},
        attrs=aligned,
    )
    return triton.compile(
        source,
        target=target_of(card),
        options={**options, "enable_fp_fusion": True},
    )


def resource_usage(compiled):
    """Registers and stack of a thread, as the vendor's own tools give them."""
    if "amdgcn" in compiled.asm:
        words = {"registers": r"\.vgpr_count:\s*(\d+)", "stack": r"vgpr_spill_count:\s*(\d+)"}
        assembly = compiled.asm["amdgcn"]
        return {key: int(re.search(word, assembly).group(1)) for key, word in words.items()}
    folder = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as made:
        binary = Path(made) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        shown = subprocess.run(
            [folder / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown.stdout)
    return {"registers": int(found.group(1)), "stack": int(found.group(2))}


def narrow_products(compiled):
    """Products of a block of indices in 32 bits: rows * V and rows * D go beyond them."""
    return re.findall(r"arith\.muli .*tensor<[\dx]+xi32>", compiled.asm["ttir"])


def report(kernel, constants, options, dtype, card):
    """Everything the tests look at, of one kernel."""
    compiled = compile_kernel(kernel, constants, options, dtype, card)
    assembly = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    opcodes = {
        opcode: len(re.findall(pattern, assembly, re.MULTILINE))
        for opcode, pattern in MATRIX_OPCODES.items()
    }
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "flags": {k: v for k, v in constants.items() if isinstance(v, bool)},
        "shared_memory": compiled.metadata.shared,
        "opcodes": opcodes,
        "narrow": narrow_products(compiled),
        **resource_usage(compiled),
    }


def compile_for_amd(architecture):
    # bf16: that every such card multiplies it, and that the safe configuration is safe.
    gpu_class = launch_config.GPU_CLASSES["default"]
    for kernel, constants, options, is_product in launches(gpu_class, "bf16", is_nvidia=False):
        found = report(kernel, constants, options, "bf16", architecture)
        show(**found, is_product=is_product, limit=64 * 1024)


def show(**found):
    print(json.dumps(found), flush=True)


def compile_shipped(capability):
    gpu_class = launch_config.GPU_CLASSES[launch_config.class_name(*divmod(capability, 10))]
    for dtype in POINTERS:
        for kernel, constants, options, is_product in launches(gpu_class, dtype):
            found = report(kernel, constants, options, dtype, capability)
            show(**found, is_product=is_product, limit=gpu_class.shared_memory)


@triton.jit
def careless_kernel(weights_ptr, hidden_ptr, rows, stride_ht):
    offs_t = tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(weights_ptr + offs_t, tl.load(hidden_ptr + offs_t * stride_ht), mask=offs_t < rows)


def compile_careless():
    shipped = launch_config.GPU_CLASSES["sm_86/89"]
    kernel, constants, _, _ = next(launches(shipped, "bf16"))
    four_warps = {"num_warps": 4, "num_stages": 3}
    spilling = report(kernel, {**constants, "BLOCK_D": 64}, four_warps, "bf16", 86)
    show(**spilling, what="spills")
    too_large = {**constants, "BLOCK_D": 128}
    found = report(kernel, too_large, {"num_warps": 8, "num_stages": 4}, "bf16", 86)
    show(**found, what="shared memory", limit=shipped.shared_memory)
    turing = report(kernel, constants, {"num_warps": 8, "num_stages": 2}, "fp16", 75)
    show(**turing, what="no matrix instructions")
    show(**report(careless_kernel, {}, {}, "bf16", 86), what="narrow")


if __name__ == "__main__":
    if sys.argv[1] == "careless":
        compile_careless()
    elif sys.argv[1].startswith("gfx"):
        compile_for_amd(sys.argv[1])
    else:
        compile_shipped(int(sys.argv[1]))
