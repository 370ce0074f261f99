"""The one error of this room."""


class DatasetError(ValueError):
    """The data is not as it must be. The message names the file, the id and the field, and says what to do."""
