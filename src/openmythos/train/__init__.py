"""From a config and text to a trained model: run folders, optimisation, checkpoints."""
