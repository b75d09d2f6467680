"""Command-line tools: `python -m tools.prepare_data`, `tools.check_data`, `tools.evaluate`, `tools.check`."""
