"""Command-line tools around the library; the library never imports them."""
