"""`python -m tn_lens`."""

from tn_lens.cli.main import main

if __name__ == "__main__":
    main()
