"""A saved memory bank at hand: read it, search it, pass it on, compare it, check it."""
