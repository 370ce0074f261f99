"""`d3etr predict` as a file: accelerate launch scripts/predict.py ..."""

from d3etr_hf.cli.main import run_command

if __name__ == "__main__":
    run_command("predict")
