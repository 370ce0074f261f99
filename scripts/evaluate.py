"""`d3etr evaluate` as a file: accelerate launch scripts/evaluate.py ..."""

from d3etr_hf.cli.main import run_command

if __name__ == "__main__":
    run_command("evaluate")
