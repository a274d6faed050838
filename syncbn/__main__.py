"""`python -m syncbn VERB`: the `syncbn` command as a module, for `torchrun ... -m syncbn train`."""

from syncbn.cli import main

if __name__ == "__main__":
    main()
