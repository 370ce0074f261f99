"""What leaves the machine: the run folder, the model card, the pictures, and the way to the Hub."""
