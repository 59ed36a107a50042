"""One file per claim of the field: its arms, its measure, and a verdict rule fixed in advance."""
