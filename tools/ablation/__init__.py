"""The parts of `tools.ablate`: settings and runs, step times, results and statistics, tables and plots."""
