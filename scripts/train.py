"""`d3etr train` as a file: accelerate launch scripts/train.py ..."""

from d3etr_hf.cli.main import run_command

if __name__ == "__main__":
    run_command("train")
