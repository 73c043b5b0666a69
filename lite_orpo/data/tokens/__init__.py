"""Preference rows -> token ids: chat templates, special tokens, what a template may take."""
