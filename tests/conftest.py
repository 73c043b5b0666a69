"""Settings that must stand before any test imports a library."""

import os

# No test may reach for the network, whoever starts the suite and however.
os.environ["HF_HUB_OFFLINE"] = "1"
# TRL warns on import that its ORPO is experimental; warnings are errors here.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
