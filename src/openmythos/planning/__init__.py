"""What a config costs, and where it fits: before anything is trained or loaded."""
