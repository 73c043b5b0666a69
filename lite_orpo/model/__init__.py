"""The base model: loading, the adapter on it, and its output head as the loss sees it."""
