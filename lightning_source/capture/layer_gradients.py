"""One forward of the user's code and one backward to the layers' outputs: what each block saw, per example.

A forward hook keeps a layer's input and the graph edge of its output. ``torch.autograd.grad`` to those edges computes
no weight gradient, touches no ``.grad`` and no ``requires_grad``, and survives in-place activations behind the layer,
because the edge names the output before them. A layer called several times in one forward (a shared module) adds
positions: the example's gradient is the sum over its calls.

Where parameters are used without their module's forward (attention's projections, tied weights), a torch function mode
keeps the same of the calls of ``F.linear`` and ``F.embedding`` that take them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_source.capture.broadcasts import BroadcastTap
from lightning_source.capture.masked_rows import by_owner, owners_of
from lightning_source.curvature.batched_autograd import batched_gradients
from lightning_source.curvature.block_gradients import BlockGradients
from lightning_source.layers import Block, Call, captured_vectors
from lightning_source.names import named_modules, named_parameters

ForwardHook = Callable[[nn.Module, tuple[object, ...], dict[str, object], object], object]
# Examples whose own backwards run at once where a parameter has no form.
EXAMPLES_AT_ONCE = 16
_UNKNOWN = torch.empty(0)  # stands for the gradient until the backward has run


class _Use(NamedTuple):
    call: Call  # its gradient is not known yet
    edge: GradientEdge
    examples: int | None  # attention works on [T, N, ...] and rows [T · N, ...]: N
    owners: Tensor | None  # the example of each row, where a mask picked the rows


class GradientCapture:
    """The layer calls of one forward; :meth:`captured` runs the backward."""

    def __init__(self, module: nn.Module, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self.module = module
        by_name = named_modules(module)
        self._modules = {block.module: by_name[block.module] for block in blocks}
        self._hooked = {
            self.key(block): block
            for block in blocks
            if not (block.layer_form.functional or block.layer_form.broadcasts or block.free)
        }
        self._parameters = named_parameters(module)
        self._calls: dict[str, list[_Use]] = defaultdict(list)  # by key
        self._examples = 1  # in the batch
        self._clear: set[Node] = set()  # nodes of the graph behind which no mask picks rows
        self.without_gradient: set[str] = set()  # keys of what ran with gradients off, at least once
        self.half: set[str] = set()  # keys of what has outputs in half precision
        self._escaped: dict[str, str] = {}  # by key of what enters elsewhere than by broadcasting: by which function

    @staticmethod
    def key(block: Block) -> str:
        """What a block's uses are kept under: its module, or its parameter where that is looked at by itself."""
        form = block.layer_form
        return block.parameters[0] if form.functional or form.local or form.broadcasts else block.module

    @contextmanager
    def listening(self, examples: int) -> Iterator[GradientCapture]:
        """Record every call of a tracked layer on a batch inside the ``with``; the hooks are gone afterwards."""
        self._calls.clear()
        self._clear = set()
        self._escaped.clear()
        self._examples = examples
        functional = [block for block in self.blocks if block.layer_form.functional]
        names = {id(self._parameters[name]): name for block in functional for name in block.parameters}
        with ExitStack() as stack:
            for block in self._hooked.values():
                hook = self._modules[block.module].register_forward_hook(self._hook(block, examples), with_kwargs=True)
                stack.callback(hook.remove)
            if names:
                stack.enter_context(_FunctionTap(names, self))
            if broadcast := {self.key(block): block.layout for block in self.blocks if block.layer_form.broadcasts}:
                parameters = {name: self._parameters[name] for name in broadcast}
                stack.enter_context(
                    BroadcastTap(parameters, broadcast, examples, self._enter, self._escaped.setdefault)
                )
            if any(isinstance(child, nn.RNNBase) for child in self.module.modules()):
                # cuDNN's recurrent layers have no backward in eval mode.
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield self

    def _hook(self, block: Block, examples: int) -> ForwardHook:
        key, form = self.key(block), block.layer_form

        def remember(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
            if isinstance(output, Tensor) and output._is_view() and output.requires_grad:
                # In-place additions to a view, `y = linear(x); y += other(x)`, cannot be differentiated to the view
                # alone: torch breaks off. The same values that are no view can.
                output = torch.ops.aten._unsafe_view(output, output.shape)
            outputs = form.outputs(output)
            if not outputs:
                return output
            inputs = form.keep(layer, args, kwargs)
            if form.repeats:
                inputs, output = form.repeat(inputs, outputs[0], examples, block.layout)
                outputs = [output]
            for index, tensor in enumerate(outputs):
                self.keep(key, tensor, Call(inputs, _UNKNOWN, output=index))
            return output

        return remember

    def keep(self, key: str, output: Tensor, call: Call, examples: int | None = None) -> None:
        """Remember one use, whose gradient is not known yet."""
        if output.dtype in (torch.float16, torch.bfloat16):
            self.half.add(key)
        if output.requires_grad:
            owners = owners_of(output, self._examples, self._clear) if output.dim() == 2 and examples is None else None
            self._calls[key].append(_Use(call, get_gradient_edge(output), examples, owners))
        else:
            self.without_gradient.add(key)

    def _enter(self, name: str, value: Tensor, operand: Tensor, parameter: Tensor) -> None:
        """A parameter enters with a value for each example."""
        if value.requires_grad:
            self._calls[name].append(_Use(Call((operand, parameter), _UNKNOWN), get_gradient_edge(value), None, None))
        else:
            self.without_gradient.add(name)

    def captured(
        self,
        target: Tensor,
        examples: int,
        retain_graph: bool = False,
        refused: dict[str, str] | None = None,
        each: Tensor | None = None,
    ) -> dict[str, BlockGradients]:
        """Backward from a target to the layers' outputs.

        Args:
            target: one value for each example, ``[B]``, or a scalar that is a sum over examples.
            examples: number of examples in the batch.
            retain_graph: keep the graph for another call.
            refused: blocks that cannot be told apart by example are entered here with the reason.
            each: values ``[B]`` for the blocks that have no form; ``target`` by default.

        Returns:
            Blocks by name; a block whose layer did not run, or does not reach ``target``, is absent.

        Raises:
            ValueError: a layer's input is not laid out by example, or a block without a form meets a scalar target, and
                ``refused`` is not given; the message begins with the layer's name.
        """
        if not target.requires_grad:
            return {}
        result = self._free(target if each is None else each, examples, refused)
        uses = [use for calls in self._calls.values() for use in calls]
        edges = [use.edge for use in uses]
        outputs = (
            torch.autograd.grad(target.sum(), edges, retain_graph=retain_graph, allow_unused=True) if edges else ()
        )
        gradients = dict(zip(map(id, uses), outputs, strict=True))
        for block in self.blocks:
            if self.key(block) in self._escaped and block.layer_form.broadcasts:
                _refuse(block, f"no layer form, and it is used by `{self._escaped[self.key(block)]}`", refused)
                continue
            own = [(use, gradients[id(use)]) for use in self._calls.get(self.key(block), ())]
            reached = [(use, gradient) for use, gradient in own if gradient is not None]
            if reached and not block.free:
                try:
                    calls = [_by_example(use, gradient, examples) for use, gradient in reached]
                    result[block.name] = block.capture(self._modules[block.module], calls, examples)
                except ValueError as error:
                    _refuse(block, str(error), refused)
        return result

    def _free(self, target: Tensor, examples: int, refused: dict[str, str] | None) -> dict[str, BlockGradients]:
        """The blocks that have no form, from the gradient of each entry of ``target [B]``."""
        blocks = [block for block in self.blocks if block.free]
        if not blocks:
            return {}
        if target.numel() != examples:
            for block in blocks:
                _refuse(block, "no layer form, and the losses of single examples are not known", refused)
            return {}
        parameters = [self._parameters[block.parameters[0]] for block in blocks]
        rows = per_example_gradients(target.reshape(examples), parameters)
        return {
            block.name: captured_vectors(gradients.reshape(examples, -1))
            for block, gradients in zip(blocks, rows, strict=True)
            if gradients is not None
        }


def _refuse(block: Block, reason: str, refused: dict[str, str] | None) -> None:
    if refused is None:
        raise ValueError(f"`{block.module}`: {reason}")
    refused[block.name] = reason


def per_example_gradients(target: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients ``[B, *shape]`` of every entry of ``target [B]``: a full backward for each example.

    They run several at once where every operation has a batching rule, which costs their number times the memory of
    one backward; else one after another. ``None`` for a parameter that does not reach the target.
    """
    pieces = []
    for start in range(0, len(target), EXAMPLES_AT_ONCE):
        rows = target[start : start + EXAMPLES_AT_ONCE]
        eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        pieces.append(batched_gradients([rows], parameters, [eye]))
    return [
        None if any(rows is None for rows in columns) else torch.cat([rows for rows in columns if rows is not None])
        for columns in zip(*pieces, strict=True)
    ]


def _by_example(use: _Use, gradients: Tensor, examples: int) -> Call:
    """The call with its gradient, and with examples in the first dimension of both where it is known to differ."""
    call = use.call._replace(gradients=gradients)
    if use.owners is not None:
        if not isinstance(call.inputs, Tensor) or len(call.inputs) != len(gradients):
            raise ValueError("a mask picked its rows, and its input is not made of rows")
        inputs, gradients = (by_owner(rows, use.owners, examples) for rows in (call.inputs, gradients))
        return call._replace(inputs=inputs, gradients=gradients)
    if use.examples is None:
        return call
    inputs, gradients = (
        rows.reshape(-1, use.examples, rows.shape[-1]).transpose(0, 1) for rows in (call.inputs, gradients)
    )
    return call._replace(inputs=inputs, gradients=gradients)


# Under a mode, attention's function hands itself to the mode instead of running. This copy of it runs, so that the mode
# sees the calls inside.
_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    vars(F) | {"has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


class _FunctionTap(TorchFunctionMode):
    """Keeps the calls of ``F.linear`` and ``F.embedding`` on parameters, given their names by ``id``."""

    def __init__(self, names: dict[int, str], recording: GradientCapture) -> None:
        super().__init__()
        self.names = names
        self.recording = recording
        self.attending: int | None = None

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward and self.attending is None:
            query = args[0] if args else kwargs["query"]
            self.attending = query.shape[1] if query.dim() == 3 else 1
            try:
                with self:  # a mode is off inside its own handler
                    return _attention(*args, **kwargs)
            finally:
                self.attending = None
        output = function(*args, **kwargs)
        if function is F.linear and isinstance(output, Tensor):
            self._linear(output, *args, **kwargs)
        elif function is F.embedding and isinstance(output, Tensor):
            self._embedding(output, *args, **kwargs)
        return output

    def _linear(self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        owner, row = self._find(weight)
        other, bias_row = (None, 0) if bias is None else self._find(bias)
        for name, start in ((owner, row), (other, bias_row)):
            if name is not None:
                call = Call(input.detach(), _UNKNOWN, "linear", start, other)
                self.recording.keep(name, output, call, self.attending)

    def _embedding(
        self,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        *args: object,
        **kwargs: object,
    ) -> None:
        owner, _ = self._find(weight)
        if owner is not None:
            padding = padding_idx if padding_idx is None or padding_idx >= 0 else len(weight) + padding_idx
            self.recording.keep(owner, output, Call(input.detach(), _UNKNOWN, "embedding", padding=padding))

    def _find(self, used: Tensor) -> tuple[str | None, int]:
        """The parameter that was used, whole or by some rows of it, and the first of those rows."""
        if id(used) in self.names:
            return self.names[id(used)], 0
        base = used._base
        if base is None or id(base) not in self.names:
            return None, 0
        if used.shape[1:] != base.shape[1:] or used.stride() != base.stride():
            return None, 0
        return self.names[id(base)], (used.storage_offset() - base.storage_offset()) // base.stride(0)
