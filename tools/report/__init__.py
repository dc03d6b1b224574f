"""A run, or several, as one HTML page: figures of learning and memory, a browser of the bank."""
