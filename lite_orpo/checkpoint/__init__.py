"""Checkpoints that are complete or absent: staged, synced, renamed, with a manifest."""
