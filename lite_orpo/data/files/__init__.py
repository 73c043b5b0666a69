"""Files, folders and data sets -> raw rows with the place that each came from."""
