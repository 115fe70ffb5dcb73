"""The one exception of this package."""


class PatchError(RuntimeError):
    """A model does not hold what its registry entry promises, a swap could not be proved, or a patch cannot be undone.

    The message names the function, the rule that was broken, the value that broke it and what to do about it.
    """
