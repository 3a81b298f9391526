"""The words of the command line, a file or folder each; ``cli`` calls their ``run``."""
