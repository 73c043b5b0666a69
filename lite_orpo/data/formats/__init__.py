"""Raw rows -> preference rows: which columns mean what, and what is wrong with a value."""
