"""Figures of runs, benchmarks and studies; measures of stability and routing."""
