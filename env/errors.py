"""The one kind of error that this tool raises on purpose."""


class ImageError(Exception):
    """What is wrong, where, and how to mend it."""
