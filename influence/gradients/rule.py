"""What a rule for a type of layer provides, and how it meets the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.errors import InputError
from influence.gradients.term import Term


@dataclass(frozen=True)
class Presentation:
    """How a stored parameter is seen: `parts` matrices of (out, in) below each other.

    transposed: the parameter is stored as (..., in, out).
    """

    parts: int
    out: int
    in_: int
    transposed: bool = False

    def present(self, stored: Tensor) -> Float[Tensor, "rows in"]:
        """The parameter, or an optimiser's moments of it, as (parts * out, in)."""
        if self.transposed:
            stored = stored.mT
        return stored.reshape(self.parts * self.out, self.in_)

    def stored(self, presented: Float[Tensor, "rows in"], shape: torch.Size) -> Tensor:
        """The other way round: what `present` would show so, in the parameter's own shape."""
        if not self.transposed:
            return presented.reshape(shape)
        return presented.view(self.parts, self.out, self.in_).mT.reshape(shape)


def plain(parameter: Tensor) -> Presentation:
    """The last dimension as `in` and all others as `out`; a vector is one row."""
    width = parameter.shape[-1] if parameter.ndim else 1
    return Presentation(1, parameter.numel() // max(width, 1), width)


class Rows:
    """Which sample each row of a layer's input belongs to, in one batch.

    size, tokens: of the padded batch. response: the sample of every token whose logits exist, in
    order; the output head sees these alone. `only` is the one sample that is run now, if a layer is
    run sample by sample.
    """

    def __init__(
        self, size: int, tokens: int, response: Int[Tensor, " n"], head: nn.Module | None
    ) -> None:
        self.size = size
        self.tokens = tokens
        self.only: int | None = None
        self._response = response
        # With an adapter the head is a module of several.
        self._head = set() if head is None else {id(module) for module in head.modules()}
        self._slots: tuple[Tensor, int] | None = None

    @contextmanager
    def one_sample(self, sample: int) -> Iterator[None]:
        """Inside, whatever a layer is called with belongs to `sample`."""
        before, self.only = self.only, sample
        try:
            yield
        finally:
            self.only = before

    def placement(self, module: nn.Module) -> Placement:
        """How tensors of a call to `module` that is made now are cut by sample."""
        return Placement(self, module, self.only, id(module) in self._head)

    def response_slots(self) -> tuple[Int[Tensor, " n"], int]:
        """Place of every response row in a (size * longest) grid, and the longest."""
        if self._slots is None:
            counts = torch.bincount(self._response, minlength=self.size)
            first = counts.cumsum(0) - counts
            rank = torch.arange(len(self._response), device=first.device) - first[self._response]
            longest = int(counts.max())
            self._slots = self._response * longest + rank, longest
        return self._slots

    @property
    def response_count(self) -> int:
        """Number of response rows in the batch."""
        return len(self._response)


class RowsError(InputError):
    """A module was called in a way in which its rows cannot be told apart by sample."""

    def __init__(self, module: nn.Module, why: str) -> None:
        super().__init__(
            f"gradients.parameters: a {type(module).__name__} was {why}; leave its parameters out"
        )
        self.module = module


@dataclass(frozen=True)
class Placement:
    """Cuts a layer's rows by sample; made when the layer is called, used when gradients arrive."""

    rows: Rows
    module: nn.Module
    only: int | None
    at_head: bool

    def cut(self, x: Tensor) -> Float[Tensor, "g t d"]:
        """`x` with one group of rows per sample (or the one group of `only`).

        From (b, ..., d), (b * t, d) flattened, or at the output head the response rows (1, n, d).
        Raises RowsError if the rows cannot be told apart by sample.
        """
        size, width = self.rows.size, x.shape[-1]
        if self.only is not None:
            return x.reshape(1, -1, width)
        if x.ndim >= 3 and x.shape[0] == size and not (self.at_head and size == 1):
            return x.reshape(size, -1, width)
        if x.ndim == 2 and x.shape[0] == size * self.rows.tokens:
            return x.view(size, self.rows.tokens, width)
        if self.at_head and x.shape[:2] == (1, self.rows.response_count):
            slots, longest = self.rows.response_slots()
            grid = x.new_zeros(size * longest, width)
            return grid.index_copy_(0, slots, x[0]).view(size, longest, width)
        raise RowsError(
            self.module,
            f"called with shape {tuple(x.shape)} in a batch of {size} samples of "
            f"{self.rows.tokens} tokens, so that its rows cannot be assigned to samples",
        )

    def sample(self, device: torch.device) -> Int[Tensor, " g"] | None:
        """The sample of every group that `cut` returns; None: group k is sample k."""
        return None if self.only is None else torch.tensor([self.only], device=device)


@dataclass
class Sink:
    """Collects the terms of one parameter; hands them over once every call has given its own.

    keep: makes of a layer's input what is kept of it until the gradients of its output arrive;
    sketched: whether the terms are `sketched` by that.
    """

    consume: Callable[[list[Term]], None]
    keep: Callable[[Tensor], Tensor] = Tensor.detach
    sketched: bool = False
    pending: int = 0
    terms: list[Term] = field(default_factory=list)

    def expect(self) -> None:
        """A call whose gradients will come."""
        self.pending += 1

    def give(self, *terms: Term) -> None:
        """The gradients of one call."""
        self.terms += [t.as_sketched() for t in terms] if self.sketched else terms
        self.pending -= 1
        if self.pending == 0:
            self.flush()

    def flush(self) -> None:
        """Hand over what has come: a call whose output has no effect on the loss gives nothing."""
        terms, self.terms = self.terms, []
        if terms:
            self.consume(terms)


Attach = Callable[[nn.Module, Mapping[str, Sink], Rows], AbstractContextManager[None]]


@dataclass(frozen=True)
class Rule:
    """How the gradients of the parameters that a type of module owns are written as terms.

    present: how each parameter of its own is presented, by its name in the module.
    attach: (module, the sinks of its attributed parameters, rows of the batch) -> a context in
        which every forward call of the module will give its terms during the backward pass.
    replaces_forward: whether it does so by a forward of its own, beside which no other rule can
        see the module's parameters.
    inputs: the parameters whose terms have the module's input as their factor x, whatever linear
        map of its last dimension it went through meanwhile, and those whose terms do without it.
    """

    name: str
    present: Callable[[nn.Module], dict[str, Presentation]]
    attach: Attach
    replaces_forward: bool = False
    inputs: Mapping[str, Literal["factor", "unused"]] = field(default_factory=dict)


TakeTerm = Callable[[nn.Module, Tensor, Tensor, Placement], Term]


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calls to the module run `forward`; whatever an instance had of its own comes back."""
    instance: Any = module
    before = vars(module).get("forward")
    instance.forward = forward
    try:
        yield
    finally:
        if before is None:
            del instance.forward
        else:
            instance.forward = before


@contextmanager
def swapped_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module computes with `values` in place of its parameters of these names.

    Unlike `torch.func.functional_call` this does not call the module, so none of its hooks run.
    """
    before: list[tuple[nn.Module, str, Tensor | None]] = []
    try:
        for name, value in values.items():
            path, _, own_name = name.rpartition(".")
            owner = module.get_submodule(path)
            before.append((owner, own_name, owner._parameters[own_name]))
            owner._parameters[own_name] = value  # type: ignore[assignment]
        yield
    finally:
        for owner, own_name, parameter in before:
            owner._parameters[own_name] = parameter  # type: ignore[assignment]


def tracked(x: Tensor) -> Tensor:
    """`x` with a gradient, as no leaf: the model may go on to change it in place."""
    return x.detach().requires_grad_(True).clone()


def output_gradients(terms: Mapping[str, TakeTerm]) -> Attach:
    """`attach` of layers whose gradients follow from their first input and output's gradient.

    terms: by parameter, (module, input, gradient of the output, placement) -> the term. Where a
    layer returns a tuple, its first entry counts.
    """

    @contextmanager
    def attach(module: nn.Module, sinks: Mapping[str, Sink], rows: Rows) -> Iterator[None]:
        def after_forward(_module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
            x: Tensor = (args[0] if args else next(iter(kwargs.values()))).detach()
            placement = rows.placement(module)
            first = output[0] if isinstance(output, tuple) else output
            assert isinstance(first, Tensor)
            replaced = None
            if first.shape[0] == 1 < rows.size and placement.only is None and x.ndim == 2:
                # Position embeddings are looked up once for the whole batch, and then broadcast:
                # their gradient would come back summed over the samples.
                first = replaced = first.expand(rows.size, *first.shape[1:]).clone()
                x = x.expand(rows.size, -1)
            if not first.requires_grad:
                first = replaced = tracked(first)
            for sink in sinks.values():
                sink.expect()
            # To be emptied: the graph keeps its hooks alive until the pass is over. x is detached,
            # so that what is made of it has no graph.
            held = {name: sink.keep(x) for name, sink in sinks.items()}

            def after_backward(gradient: Tensor) -> None:
                # The backward pass records no graph of its own: nothing here is differentiable.
                for name, sink in sinks.items():
                    sink.give(terms[name](module, held.pop(name), gradient, placement))

            first.register_hook(after_backward)
            if replaced is not None and isinstance(output, tuple):
                return (replaced, *output[1:])
            return replaced

        handle = module.register_forward_hook(after_forward, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    return attach
