"""What a run leaves: folders that are complete or absent, without pickle, token or local path."""
