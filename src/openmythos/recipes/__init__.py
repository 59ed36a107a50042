"""Named full runs as Python functions: model, data, training and evaluation."""
