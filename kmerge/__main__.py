"""`python -m kmerge` is `kmerge`."""

from kmerge.cli import main

if __name__ == "__main__":
    main()
