"""`python -m draftsmith.recipes`: the `draftsmith` command where there is no console script on the path."""

from draftsmith.recipes.cli.main import main

if __name__ == "__main__":
    main()
