"""Figures of runs and studies; measures of stability and routing."""
