"""`d3etr publish` as a file: accelerate launch scripts/publish.py ..."""

from d3etr_hf.cli.main import run_command

if __name__ == "__main__":
    run_command("publish")
