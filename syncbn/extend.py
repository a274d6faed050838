"""Models, data sets, transforms, tasks and optimisers of one's own, for a config to choose by name.

    import syncbn.extend as extend

    @extend.model("unet")
    def unet(shape: tuple[int, int, int], num_classes: int, *, width: int = 32) -> nn.Module: ...

    @extend.data("tiles")
    def tiles(root: Path, split: str, *, size: int = 256) -> Dataset: ...

    @extend.transform("noise")
    def noise(input: Tensor, *, std: float = 0.1) -> Tensor: ...

    @extend.task("depth")
    class Depth(extend.Task): ...

With `extensions=[mine]` for `mine.py` in the current folder:
`model=unet model.options.width=64 data=tiles data.transforms.noise.std=0.2 task=depth`.
Keyword-only parameters are options, typed by their annotations.
"""

from syncbn.callbacks import Callback, Moment
from syncbn.registry import CALLBACKS, DATA, MODELS, OPTIMIZERS, TASKS, TRANSFORMS
from syncbn.tasks import Classification, Regression, Task

__all__ = [
    "Callback",
    "Classification",
    "Moment",
    "Regression",
    "Task",
    "callback",
    "data",
    "model",
    "optimizer",
    "task",
    "transform",
]

model = MODELS.register
"""`(shape, num_classes, *, options) -> nn.Module` for inputs `(N, *shape)`; outputs are `(N, num_classes)` where the
task is classification. Built on the CPU in float32; random weights are drawn from torch's global generator, which is
seeded by the run. Its batch norms are torch's own, which the run's `norm` replaces."""
data = DATA.register
"""`(root, split, *, options) -> Dataset`, with `split` "train" or "test": a map-style Dataset of (input, target), where
inputs are float tensors of one shape, and targets tensors or numbers of one shape. Classes are int; their number is the
data set's `num_classes`, or the length of its `classes`, or else one more than the largest target. Whatever it draws
from the global generators of Python, numpy or torch is decided by the run's seed, and for a sample by the step too."""
transform = TRANSFORMS.register
"""`(input, *, options) -> input`, or `(input, target, *, options) -> (input, target)` where the target changes with the
input: what is done to each training sample, and with `transform(name, on_test=True)` to test samples too. What it draws
from the global generators of Python, numpy or torch is decided by the run's seed, the step and the sample."""
task = TASKS.register
"""A subclass of `Task`; options are keyword-only parameters of its `__init__`."""
callback = CALLBACKS.register
"""A subclass of `Callback`; options are keyword-only parameters of its `__init__`."""
optimizer = OPTIMIZERS.register
"""`(groups, lr, *, options) -> Optimizer` over torch's parameter groups, whose `weight_decay` is set."""
