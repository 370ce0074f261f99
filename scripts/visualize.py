"""`d3etr visualize` as a file: accelerate launch scripts/visualize.py ..."""

from d3etr_hf.cli.main import run_command

if __name__ == "__main__":
    run_command("visualize")
