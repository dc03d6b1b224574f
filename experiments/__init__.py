"""What is run: one module per experiment, each a command line around the library."""
