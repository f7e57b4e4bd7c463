"""`python -m userfault`: the command line."""

from userfault.cli import main

if __name__ == "__main__":
    main()
