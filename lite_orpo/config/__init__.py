"""What a run is told: loss and training arguments, model, adapter, data and report options."""
