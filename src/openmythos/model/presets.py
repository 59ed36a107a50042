"""Named model configs."""
