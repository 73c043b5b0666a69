"""What a person looks at during and after a run: progress, metrics file, curves, samples, card."""
