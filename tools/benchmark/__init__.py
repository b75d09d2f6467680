"""What `python -m tools.bench` measures: the rows, the machine's ceilings, and how they take turns."""
