"""The methods that compare encoder memories, by name: what each adds to a student while it trains."""

from d3etr_hf.models.instance_decoder import IcdAdapter
from d3etr_hf.models.memory_adapters import (
    VIDT,
    ClockdistillAdapter,
    ComparesMemory,
    DefeatAdapter,
    DetrdistillAdapter,
    FgdAdapter,
    FitnetAdapter,
    VidtAdapter,
)

# the option that switches a method on has its name, with "_weight"
MEMORY_METHODS: dict[str, type[ComparesMemory]] = {
    "fitnet": FitnetAdapter,
    "fgd": FgdAdapter,
    "defeat": DefeatAdapter,
    "detrdistill_memory": DetrdistillAdapter,
    "clockdistill_memory": ClockdistillAdapter,
    "icd": IcdAdapter,
    VIDT: VidtAdapter,
}
