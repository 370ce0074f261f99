"""`d3etr convert` as a file: accelerate launch scripts/convert.py ..."""

from d3etr_hf.cli.main import run_command

if __name__ == "__main__":
    run_command("convert")
