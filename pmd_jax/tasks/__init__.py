"""What is asked and how it is graded. No JAX, no memory: a problem knows neither."""
