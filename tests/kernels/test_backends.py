"""Which backend runs where, and the words that say why. GPUs that are not here are described."""

from types import SimpleNamespace

import pytest
import torch

from lite_orpo_kernels import Backend, backends, fused_linear_logprobs, select_backend
from lite_orpo_kernels.launch_config import (
    GPU_CLASSES,
    LaunchConfig,
    LogitsTile,
    RowsTile,
    gpu_class,
    launch_config,
    override,
)


@pytest.fixture
def nvidia(monkeypatch):
    """Describe an NVIDIA card by its compute capability."""

    def describe(*capability):
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)

    return describe


@pytest.fixture
def amd(monkeypatch):
    """Describe an AMD card by its architecture."""

    def describe(architecture):
        monkeypatch.setattr(torch.version, "hip", "6.4")
        properties = SimpleNamespace(gcnArchName=architecture)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    return describe


def test_the_cpu_and_apple_gpus_take_pytorch():
    for device in ("cpu", "mps"):
        auto = select_backend(device)
        assert isinstance(auto, Backend) and auto.name == "chunked"
        assert f"Triton has no kernels for {device}" in auto.reason


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)])
def test_nvidia_from_ampere_on_takes_triton(nvidia, capability):
    nvidia(*capability)
    assert select_backend("cuda").name == "triton"
    assert f"class {gpu_class('cuda').name}" in select_backend("cuda").reason


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)])
def test_turing_and_older_take_pytorch_and_say_why(nvidia, capability):
    nvidia(*capability)
    found = select_backend("cuda")
    assert found.name == "chunked"
    assert "no matrix instructions for sm_{}{}".format(*capability) in found.reason


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("gfx906:sramecc+:xnack-", "chunked"),
        ("gfx1030", "chunked"),
        ("gfx90a:sramecc+:xnack-", "triton"),
        ("gfx942", "triton"),
        ("gfx1100", "triton"),
        ("gfx1201", "triton"),
    ],
)
def test_amd_cards_with_matrix_cores_take_triton(amd, architecture, name):
    amd(architecture)
    found = select_backend("cuda")
    assert found.name == name
    assert name == "triton" or architecture.split(":")[0] in found.reason


@pytest.mark.parametrize("has_matrix_instructions", [True, False])
def test_intel_gpus_with_matrix_engines_take_triton(monkeypatch, has_matrix_instructions):
    properties = SimpleNamespace(has_subgroup_matrix_multiply_accumulate=has_matrix_instructions)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: properties)
    found = select_backend("xpu")
    assert found.name == ("triton" if has_matrix_instructions else "chunked")


def test_a_gpu_without_triton_takes_pytorch_and_says_so(nvidia, monkeypatch):
    nvidia(8, 9)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda _: None)
    found = select_backend("cuda")
    assert found == Backend("chunked", "pure PyTorch in bounded memory; Triton is not installed")
    with pytest.raises(ModuleNotFoundError, match="needs the package triton"):
        select_backend("cuda", "triton")


def test_a_dtype_that_triton_does_not_take_goes_to_pytorch(nvidia):
    nvidia(9, 0)
    assert select_backend("cuda", dtype=torch.bfloat16).name == "triton"
    found = select_backend("cuda", dtype=torch.float64)
    assert found.name == "chunked" and "float64" in found.reason
    with pytest.raises(ValueError, match="bf16, fp16 and fp32, found torch.float64"):
        select_backend("cuda", "triton", torch.float64)


def test_what_is_asked_for_is_taken(nvidia):
    nvidia(8, 6)
    for name in ("triton", "chunked", "reference"):
        assert select_backend("cuda", name) == Backend(name, "asked for")
    with pytest.raises(ValueError, match="'eager' is unknown; choose one of auto, triton"):
        select_backend("cpu", "eager")
    with pytest.raises(ValueError, match="no mps target"):
        select_backend("mps", "triton")


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "_kernels_are_interpreted", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU.*TRITON_INTERPRET=1"):
        fused_linear_logprobs(
            torch.zeros(1, 4), torch.zeros(9, 4), torch.tensor([3]), backend="triton"
        )


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86/89"),
        ((8, 9), "sm_86/89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "default"),
    ],
)
def test_every_card_has_a_launch_configuration(nvidia, capability, name):
    nvidia(*capability)
    assert gpu_class("cuda") == GPU_CLASSES[name]
    assert launch_config("cuda", torch.bfloat16) == GPU_CLASSES[name].half
    assert launch_config("cuda", torch.float32) == GPU_CLASSES[name].full


def test_rocm_and_xpu_have_the_safe_configuration(amd):
    amd("gfx942")
    assert gpu_class("cuda") == gpu_class("xpu") == GPU_CLASSES["default"]


def test_a_configuration_can_be_set_and_taken_back(nvidia):
    nvidia(9, 0)
    mine = LaunchConfig(LogitsTile(64, 64, 32, 4, 2), RowsTile(64, 64, 32, 4, 2), None)
    override("cuda", torch.bfloat16, mine)
    try:
        assert launch_config("cuda", torch.bfloat16) == mine
        assert launch_config("cuda", torch.float32) == GPU_CLASSES["sm_90"].full
        # Tuned without a soft-cap, it may spill with one.
        slim = launch_config("cuda", torch.bfloat16, slim=True)
        assert slim == mine._replace(logits=GPU_CLASSES["sm_90"].slim)
    finally:
        override("cuda", torch.bfloat16, None)
    assert launch_config("cuda", torch.bfloat16) == GPU_CLASSES["sm_90"].half
    crossing = mine._replace(rows=RowsTile(64, 64, 128, 4, 2))
    with pytest.raises(ValueError, match="block_c=128 must divide logits.block_v=64"):
        override("cuda", torch.bfloat16, crossing)
    # It fits its own tile, but not the slim one of the class.
    wide = LaunchConfig(LogitsTile(128, 256, 32, 8, 3), RowsTile(64, 64, 256, 4, 2), None)
    with pytest.raises(ValueError, match="block_c=256 must divide logits.block_v=128"):
        override("cuda", torch.bfloat16, wide)
