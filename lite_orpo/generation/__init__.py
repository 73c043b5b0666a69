"""Answers of a model: prompts as training writes them, batches, sampling, streaming."""
