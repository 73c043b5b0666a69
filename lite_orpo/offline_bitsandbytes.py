"""Import bitsandbytes, where it is installed, without its reaching for the network.

On a CPU with AVX512-BF16, bitsandbytes 0.50 asks the hub for a compiled kernel of its own while it
is imported (through the package `kernels`), and warns on the terminal where it gets none. The
kernel only serves 4-bit inference of single tokens, and bitsandbytes carries a slower one that does
the same. PEFT and transformers' Trainer import bitsandbytes, so this comes before them.
"""

import importlib.util
import logging
import sys
from types import ModuleType
from typing import cast

_WARNS = "bitsandbytes.backends.cpu.ops"


def import_bitsandbytes_offline() -> None:
    """Import bitsandbytes with the package `kernels` out of its reach; once, and only if there."""
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    logger = logging.getLogger(_WARNS)
    was_disabled, logger.disabled = logger.disabled, True
    hub_kernels = sys.modules.get("kernels")
    # None makes `import kernels` fail, which bitsandbytes takes for "not installed".
    sys.modules["kernels"] = cast(ModuleType, None)
    try:
        import bitsandbytes  # noqa: F401
    except Exception:  # noqa: BLE001
        # A broken installation. Who asks for 4-bit imports it again, and is told then.
        pass
    finally:
        logger.disabled = was_disabled
        if hub_kernels is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = hub_kernels


import_bitsandbytes_offline()
