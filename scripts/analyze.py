"""`d3etr analyze` as a file: accelerate launch scripts/analyze.py ..."""

from d3etr_hf.cli.main import run_command

if __name__ == "__main__":
    run_command("analyze")
