"""What surrounds an optimiser step: rows that fit, ranks, what is refused, what is counted."""
