"""`d3etr make-shapes` as a file: accelerate launch scripts/make_shapes.py ..."""

from d3etr_hf.cli.main import run_command

if __name__ == "__main__":
    run_command("make-shapes")
