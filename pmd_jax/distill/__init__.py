"""What is minimised: records become arrays, arrays become a loss, the loss becomes an update."""
