"""Evaluation by number of loops: likelihood of text, accuracy on tasks."""
