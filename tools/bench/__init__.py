"""How fast: the parts of a training step, timed on this machine beside its roofline and peers."""
