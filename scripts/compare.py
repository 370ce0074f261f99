"""`d3etr compare` as a file: python scripts/compare.py ..."""

from d3etr_hf.cli.main import run_command

if __name__ == "__main__":
    run_command("compare")
