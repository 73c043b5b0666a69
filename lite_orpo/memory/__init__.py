"""What a run takes: planned before it, item by item, and measured."""
