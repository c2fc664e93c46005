"""`python -m tn_lens`."""

from .cli import main

if __name__ == "__main__":
    main()
