"""The bench: speed and memory, beside other libraries on the same work."""
