"""Layers: attention, feed-forward, their cache. They know of loops only a cache's slots."""
