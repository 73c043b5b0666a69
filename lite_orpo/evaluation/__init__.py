"""Log-probabilities of pairs -> figures with intervals. numpy alone: no torch, no files."""
