"""What goes wrong with models in ways that the user can put right."""


class DetectorLoadError(ValueError):
    """A detector cannot be loaded or built as asked."""
