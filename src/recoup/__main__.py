"""``python -m recoup``: the command line."""

from recoup.cli.main import app

if __name__ == "__main__":
    app(prog_name="recoup")
