"""Formulas that are computed in another way where that is faster.

One file per formula: `reference()` is the formula, in any dtype; the function of the file's name
computes it fast on the device at hand.
"""
