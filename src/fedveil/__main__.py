"""``python -m fedveil``."""

from fedveil.cli import main

if __name__ == "__main__":
    main()
