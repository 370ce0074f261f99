"""`d3etr data` as a file: python scripts/data.py check ..."""

from d3etr_hf.cli.main import run_command

if __name__ == "__main__":
    run_command("data")
