"""One paper, one file, one class."""
