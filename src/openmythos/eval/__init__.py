"""How good a model is, against the number of loops."""
