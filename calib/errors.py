"""The one exception of this package; its text is a sentence for the user."""


class CalibrationError(ValueError):
    """Text that cannot be had, or too little of it."""
