"""Scoring a trained model: likelihood and accuracy against the number of loops."""
