"""Faults that end a run. Their messages say all that its user needs: no traceback is shown beside them."""

__all__ = ["RunFault"]


class RunFault(RuntimeError):
    """Ends a run with exit status 1.

    Attributes:
        alike: every rank raises it at the same place, so that one of them speaks.
    """

    alike = True
