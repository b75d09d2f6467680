"""A checkpoint in the formats of other programs, and other programs' files as a checkpoint: `python -m tools.convert --help`."""
