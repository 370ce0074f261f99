"""The order of training images, as the Trainer's options and the number of processes ask for it."""

from accelerate import Accelerator
from torch.utils.data import Dataset
from transformers import TrainerCallback

from d3etr_hf.data.sampling import TrainingSampler
from d3etr_hf.training.training_arguments import D3etrTrainingArguments


def training_sampler(
    args: D3etrTrainingArguments, accelerator: Accelerator, dataset: Dataset, batch_size: int
) -> TrainingSampler:
    """Of one training; the same on every process.

    Args:
        batch_size: images of a process in a batch.
    """
    together = 1 if accelerator.split_batches else accelerator.num_processes
    return TrainingSampler(
        dataset,
        args.seed if args.data_seed is None else args.data_seed,
        args.train_sampling_strategy == "random",
        batch_size * together,
        args.gradient_accumulation_steps,
        fill_up=accelerator.num_processes > 1 and not args.dataloader_drop_last,
        drop_last=args.dataloader_drop_last,
    )


class FollowEpochs(TrainerCallback):
    """Tells the sampler which epoch begins, of how long a training.

    Accelerate's data loaders do so too, but not those of several processes that skip the batches which were done
    before an interruption.
    """

    sampler: TrainingSampler | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))
            self.sampler.total_steps = state.max_steps
