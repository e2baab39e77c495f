"""The one exception and the one warning of recoup."""


class RecoupError(ValueError):
    """A request recoup cannot honour.

    The message names what was asked, what is legal and, inside a network, the layer and its shape::

        RecoupError: NBSMT(threads=3): threads must be 1, 2 or 4
    """


class RecoupWarning(UserWarning):
    """Something runs otherwise than the request may suggest, and correctly: a grouped convolution on one thread."""
