"""What is wrong with a set of preference pairs, found in one pass before anything is trained.

Each file is one kind of finding: a small collector with `add(row)` and `findings()`. The list of
them, and the pass over the data, are in `survey.py`. How it is shown is not decided here.
"""
