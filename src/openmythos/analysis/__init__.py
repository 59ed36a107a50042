"""Figures: of runs, of benchmarks, and of studies."""
