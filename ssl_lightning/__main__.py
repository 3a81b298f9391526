"""``python -m ssl_lightning``."""

from ssl_lightning.cli import main

if __name__ == "__main__":
    main()
