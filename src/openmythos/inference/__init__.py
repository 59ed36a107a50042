"""Decoding a trained model: sampling and the engine that owns the cache."""
