"""Named full runs: model, data, training and evaluation in one config each."""
