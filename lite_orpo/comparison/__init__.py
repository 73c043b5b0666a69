"""Several losses, or settings of one, on one budget: what is varied, the runs, what came out."""
