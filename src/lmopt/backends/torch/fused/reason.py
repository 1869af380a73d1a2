"""Why a model keeps the portable dialect."""


class InexpressibleError(Exception):
    """The model cannot be said in ONNX Runtime's operators; the message says why, in plain words.

    It never reaches a user as an error: the exporter writes the portable graph instead and records
    the reason.
    """
