"""The whole model: its config, initialisation, presets and costs."""
