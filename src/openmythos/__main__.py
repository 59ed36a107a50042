"""`python -m openmythos`."""

from openmythos.cli import run

if __name__ == "__main__":
    run()
