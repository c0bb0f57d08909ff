"""A step made tensor by tensor, as a backward pass produces the gradients: what opt.streaming() gives."""

from . import backends


class Streaming:
    """One step as a `with` block; see Optimizer.streaming.

    Attributes
    ----------
    updated : list
        The names of the tensors updated so far, in this order.
    """

    __slots__ = ("_grad_scale", "_labels", "_left", "_optimizer", "updated")

    def __init__(self, optimizer, grad_scale):
        self._optimizer, self._grad_scale = optimizer, grad_scale
        self._labels = optimizer._tensors.structure.labels()
        self._left = None  # name -> index of the tensors not yet updated, None outside the block
        self.updated = []

    def __enter__(self):
        plan, status = self._optimizer._plan, None
        try:
            status = plan.stream_open()
            if status != backends.OK:
                raise self._optimizer._refusal(status)
            self._left = dict(zip(self._labels, range(len(self._labels)), strict=True))
            self.updated = []
            return self
        except BaseException:
            if status in (None, backends.OK):  # an interrupt; nobody would close the block
                plan.stream_close()
            raise

    def __exit__(self, *error):
        self._optimizer._plan.stream_close()
        self._left = None

    def step(self, name, grad):
        """Update the tensor of this name from its gradient, which may be overwritten afterwards.

        Parameters
        ----------
        name : hashable
            The key, index or (group index, key or index) of a tensor; each may come once in a block.
        grad : array
            Its gradient, with the dtype, shape and memory order of that parameter.

        Raises
        ------
        ValueError
            For a name that does not exist or comes again; before anything is written.
        TypeError, ValueError
            For a grad that does not fit; before anything is written.
        RuntimeError
            Outside the block, and when another thread uses this optimizer.
        """
        k, plan = self._index(name), self._optimizer._plan
        before = plan.steps_of(k)
        try:
            self._optimizer._stream(k, grad, self._grad_scale, first=not self.updated)
        finally:
            if plan.steps_of(k) > before:  # also where Ctrl-C came during the update
                del self._left[name]
                self.updated.append(name)

    def _index(self, name):
        if self._left is None:
            raise RuntimeError("this streaming block is not open: `with opt.streaming() as s: s.step(name, grad)`")
        try:
            return self._left[name]
        except (KeyError, TypeError):
            pass
        if name in self._labels:
            raise ValueError(f"name={name!r} was updated already in this streaming block")
        raise ValueError(f"name={name!r} is no tensor of this optimizer; there are {', '.join(map(repr, self._labels))}")
