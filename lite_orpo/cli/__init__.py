"""The command line: one file per command. Nothing heavy is imported for `--help`."""
