"""Configurations: each file has get_config() and is the record of a kind of run."""
