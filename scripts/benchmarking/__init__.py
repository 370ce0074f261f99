"""What a distillation step costs, beside the parts it cannot do without; used by scripts/benchmark.py."""
